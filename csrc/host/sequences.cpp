#include "host/sequences.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "host/errors.h"

namespace attnforge::host {

Sequences::Sequences(PageAllocator& pages, int64_t page_size)
    : allocator_(pages), page_size_(page_size) {}

const Sequences::Sequence& Sequences::at(const char* who, int64_t id) const {
  const auto found = table_.find(id);
  if (found != table_.end()) return found->second;
  if (id >= 1 && id < next_id_) {
    refuse(who, ": sequence ", id,
           " was freed already; free each sequence once, and do not use it "
           "afterwards");
  }
  refuse(who, ": sequence ", id, " is not of this pool; pass ids that its create() or fork() gave");
}

Sequences::Sequence& Sequences::at(const char* who, int64_t id) {
  return const_cast<Sequence&>(std::as_const(*this).at(who, id));
}

int64_t Sequences::create(std::span<const int32_t> prefix) {
  Sequence fresh;
  fresh.pages.assign(prefix.begin(), prefix.end());
  fresh.length = static_cast<int64_t>(prefix.size()) * page_size_;
  table_.emplace(next_id_, std::move(fresh));
  return next_id_++;
}

int64_t Sequences::fork(int64_t id) {
  Sequence twin = at("fork", id);
  allocator_.share(twin.pages);
  table_.emplace(next_id_, std::move(twin));
  return next_id_++;
}

std::vector<int32_t> Sequences::free(int64_t id) {
  std::vector<int32_t> freed = allocator_.release(at("free", id).pages);
  table_.erase(id);
  return freed;
}

// Whether the next token goes into a page that others hold too.
bool Sequences::copies_last(const Sequence& s, int64_t more) const {
  return more > 0 && s.length % page_size_ != 0 && allocator_.shared(s.pages.back());
}

int64_t Sequences::pages_needed(std::span<const int64_t> ids,
                                std::span<const int64_t> counts) const {
  if (ids.size() != counts.size()) {
    refuse("extend: ", ids.size(), " sequences and ", counts.size(),
           " counts; pass one count per sequence");
  }
  std::unordered_set<int64_t> seen;
  std::unordered_map<int32_t, int32_t> left;  // references of a shared page after the copies so far
  int64_t needed = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    const Sequence& s = at("extend", ids[i]);
    if (counts[i] < 0) refuse("extend: count ", counts[i], " of sequence ", ids[i], " is negative");
    if (!seen.insert(ids[i]).second) {
      refuse("extend: sequence ", ids[i], " is named twice; name each once, with all its tokens");
    }
    needed += pages_for(s.length + counts[i]) - static_cast<int64_t>(s.pages.size());
    if (!copies_last(s, counts[i])) continue;
    const int32_t page = s.pages.back();
    int32_t& references = left.try_emplace(page, allocator_.references(page)).first->second;
    if (references > 1) {  // the last holder writes in place
      --references;
      ++needed;
    }
  }
  return needed;
}

std::vector<PageCopy> Sequences::extend(std::span<const int64_t> ids,
                                        std::span<const int64_t> counts) {
  const std::vector<int32_t> fresh = allocator_.allocate(pages_needed(ids, counts));
  auto next = fresh.begin();
  std::vector<PageCopy> copies;
  for (size_t i = 0; i < ids.size(); ++i) {
    Sequence& s = at("extend", ids[i]);
    if (copies_last(s, counts[i])) {
      copies.push_back({s.pages.back(), *next});
      allocator_.release(std::span(&s.pages.back(), 1));
      s.pages.back() = *next++;
    }
    s.length += counts[i];
    while (static_cast<int64_t>(s.pages.size()) < pages_for(s.length)) s.pages.push_back(*next++);
  }
  return copies;
}

std::vector<int32_t> Sequences::truncate(int64_t id, int64_t length) {
  Sequence& s = at("truncate", id);
  if (length < 0 || length > s.length) {
    refuse("truncate: length ", length, " of sequence ", id, " is not in 0..", s.length,
           ", its length now");
  }
  const auto keep = static_cast<size_t>(pages_for(length));
  std::vector<int32_t> freed = allocator_.release(std::span(s.pages).subspan(keep));
  s.pages.resize(keep);
  s.length = length;
  return freed;
}

Compaction Sequences::compact(int64_t id, std::span<const int64_t> kept) {
  Sequence& s = at("compact", id);
  for (size_t i = 0; i < kept.size(); ++i) {
    if (kept[i] < 0 || kept[i] >= s.length || (i > 0 && kept[i] <= kept[i - 1])) {
      refuse("compact: kept token ", kept[i], " of sequence ", id, " is out of order or not in 0..",
             s.length - 1, "; pass ascending token indices");
    }
  }
  // Slots before the first gap stay where they are, in shared pages too.
  size_t first = 0;
  while (first < kept.size() && kept[first] == static_cast<int64_t>(first)) ++first;
  const auto total = static_cast<int64_t>(kept.size());
  const int64_t pages = pages_for(total);
  const int64_t first_page = static_cast<int64_t>(first) / page_size_;
  int64_t fresh_needed = 0;
  if (static_cast<int64_t>(first) < total) {
    for (int64_t p = first_page; p < pages; ++p) fresh_needed += allocator_.shared(s.pages[p]);
  }
  const std::vector<int32_t> fresh = allocator_.allocate(fresh_needed);

  std::vector<int32_t> target(s.pages.begin(), s.pages.begin() + pages);
  std::vector<int32_t> given_up(s.pages.begin() + pages, s.pages.end());
  Compaction plan;
  const auto move = [&](int64_t from, int64_t to) {
    plan.moves.push_back({s.pages[from / page_size_], static_cast<int32_t>(from % page_size_),
                          target[to / page_size_], static_cast<int32_t>(to % page_size_)});
  };
  auto next = fresh.begin();
  if (fresh_needed > 0) {
    for (int64_t p = first_page; p < pages; ++p) {
      if (!allocator_.shared(s.pages[p])) continue;
      given_up.push_back(s.pages[p]);
      target[p] = *next++;
    }
    // What stays in the first page moves with it, if that page is replaced.
    if (target[first_page] != s.pages[first_page]) {
      for (int64_t t = first_page * page_size_; t < static_cast<int64_t>(first); ++t) move(t, t);
    }
  }
  for (auto to = static_cast<int64_t>(first); to < total; ++to) move(kept[to], to);
  s.pages = std::move(target);
  s.compacted = s.compacted || total < s.length;
  s.length = total;
  plan.freed = allocator_.release(given_up);
  return plan;
}

std::vector<int32_t> Sequences::adopt(int64_t id, std::span<const int32_t> pages) {
  Sequence& s = at("adopt", id);
  allocator_.share(pages);
  std::vector<int32_t> given_up(s.pages.begin(), s.pages.begin() + pages.size());
  std::copy(pages.begin(), pages.end(), s.pages.begin());
  return allocator_.release(given_up);
}

}  // namespace attnforge::host
