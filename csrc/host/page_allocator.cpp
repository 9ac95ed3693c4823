#include "host/page_allocator.h"

#include <limits>

#include "host/errors.h"

namespace attnforge::host {

PageAllocator::PageAllocator(int64_t num_pages) {
  if (num_pages < 1 || num_pages > std::numeric_limits<int32_t>::max()) {
    refuse("__init__: num_pages ", num_pages, " is not in 1..2147483647 (page ids are int32)");
  }
  references_.assign(static_cast<size_t>(num_pages), 0);
  free_.reserve(references_.size());
  for (int64_t page = num_pages; page-- > 0;) free_.push_back(static_cast<int32_t>(page));
}

void PageAllocator::check_id(const char* who, int32_t page) const {
  if (page < 0 || page >= num_pages()) {
    refuse(who, ": page ", page, " is not of this pool, whose pages are 0..", num_pages() - 1,
           "; pass ids that allocate() of the same pool gave");
  }
}

std::vector<int32_t> PageAllocator::allocate(int64_t count) {
  if (count < 0) refuse("allocate: count ", count, " is negative");
  if (count > num_free()) {
    throw OutOfPages(sentence("allocate: ", count, " pages are needed and ", num_free(), " of ",
                              num_pages(), " are free; free sequences, or make the pool larger"));
  }
  const std::vector<int32_t> pages(free_.rbegin(), free_.rbegin() + count);
  free_.resize(free_.size() - static_cast<size_t>(count));
  for (const int32_t page : pages) references_[page] = 1;
  return pages;
}

void PageAllocator::share(std::span<const int32_t> pages) {
  for (const int32_t page : pages) {
    check_id("share", page);
    if (references_[page] == 0) {
      refuse("share: page ", page, " is free; only allocated pages can be shared");
    }
  }
  for (const int32_t page : pages) ++references_[page];
}

std::vector<int32_t> PageAllocator::release(std::span<const int32_t> pages) {
  // Taking references back one by one finds a page that is named more often than it is held;
  // what was taken is given back before the error leaves.
  for (size_t i = 0; i < pages.size(); ++i) {
    const bool foreign = pages[i] < 0 || pages[i] >= num_pages();
    if (!foreign && references_[pages[i]] > 0) {
      --references_[pages[i]];
      continue;
    }
    for (size_t j = 0; j < i; ++j) ++references_[pages[j]];
    if (foreign) check_id("release", pages[i]);
    refuse("release: page ", pages[i], " is released more often than it was allocated and shared (",
           references_[pages[i]], " references); release each reference once");
  }
  std::vector<int32_t> freed;
  for (const int32_t page : pages) {
    // A page named twice reaches 0 once: mark it while it is collected.
    if (references_[page] == 0) {
      references_[page] = -1;
      freed.push_back(page);
    }
  }
  for (const int32_t page : freed) {
    references_[page] = 0;
    free_.push_back(page);
  }
  return freed;
}

int32_t PageAllocator::references(int32_t page) const {
  check_id("references", page);
  return references_[page];
}

}  // namespace attnforge::host
