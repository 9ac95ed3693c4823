// Reference-counted page ids. A page is free (0 references), owned (1) or shared (more): whoever
// writes to a shared page must take a copy of its own first (copy-on-write).
//
// The list of free pages is a stack: the page freed last is handed out first, while it is still in
// a cache. Every call checks all of its arguments before it changes anything. Not locked.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace attnforge::host {

class PageAllocator {
 public:
  explicit PageAllocator(int64_t num_pages);

  // `count` pages with one reference each, or OutOfPages.
  std::vector<int32_t> allocate(int64_t count);
  // One more reference to each page; a page may be named more than once.
  void share(std::span<const int32_t> pages);
  // One reference less to each; returns the pages that became free, in order.
  std::vector<int32_t> release(std::span<const int32_t> pages);

  int32_t references(int32_t page) const;
  bool shared(int32_t page) const { return references(page) > 1; }
  int64_t num_pages() const { return static_cast<int64_t>(references_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }

 private:
  void check_id(const char* who, int32_t page) const;

  std::vector<int32_t> references_;  // per page
  std::vector<int32_t> free_;        // top at the back
};

}  // namespace attnforge::host
