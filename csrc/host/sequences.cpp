#include "host/sequences.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "host/errors.h"

namespace attnforge::host {

Sequences::Sequences(PageAllocator& pages, int64_t page_size, int64_t lanes)
    : allocator_(pages), page_size_(page_size), lanes_(lanes) {}

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

// Pages of s, by place, that `more` new tokens are written to and others hold too. Lanes of
// different lengths write in different places.
std::vector<size_t> Sequences::shared_targets(const Sequence& s, int64_t more) const {
  std::vector<size_t> found;
  const size_t lanes = more > 0 ? std::max<size_t>(s.lacks.size(), 1) : 0;
  for (size_t l = 0; l < lanes; ++l) {
    const int64_t start = s.lane(static_cast<int64_t>(l));
    const auto end = std::min(s.pages.size(), static_cast<size_t>(pages_for(start + more)));
    for (auto p = static_cast<size_t>(start / page_size_); p < end; ++p) {
      if (allocator_.shared(s.pages[p])) found.push_back(p);
    }
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
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
    for (const size_t p : shared_targets(s, counts[i])) {
      const int32_t page = s.pages[p];
      int32_t& references = left.try_emplace(page, allocator_.references(page)).first->second;
      if (references > 1) {  // the last holder writes in place
        --references;
        ++needed;
      }
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
    for (const size_t p : shared_targets(s, counts[i])) {
      copies.push_back({s.pages[p], *next});
      allocator_.release(std::span(&s.pages[p], 1));
      s.pages[p] = *next++;
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
  for (size_t l = 0; l < s.lacks.size(); ++l) {
    const int64_t own = s.lane(static_cast<int64_t>(l));
    if (own < s.length - length) {
      refuse("truncate: length ", length, " takes ", s.length - length, " tokens off sequence ", id,
             ", whose lane ", l, " holds ", own,
             "; lanes of different lengths lose as many tokens "
             "each: truncate to ",
             s.length - own, " or more, or compact it");
    }
  }
  const auto keep = static_cast<size_t>(pages_for(length));
  std::vector<int32_t> freed = allocator_.release(std::span(s.pages).subspan(keep));
  s.pages.resize(keep);
  s.length = length;
  return freed;
}

Compaction Sequences::compact(int64_t id, std::span<const std::vector<int64_t>> kept) {
  Sequence& s = at("compact", id);
  const bool each = kept.size() > 1;
  int64_t total = 0;
  bool shorter = false;
  for (size_t l = 0; l < kept.size(); ++l) {
    const int64_t length = s.lane(static_cast<int64_t>(l));
    for (size_t i = 0; i < kept[l].size(); ++i) {
      if (kept[l][i] < 0 || kept[l][i] >= length || (i > 0 && kept[l][i] <= kept[l][i - 1])) {
        refuse("compact: kept token ", kept[l][i], " of sequence ", id,
               " is out of order or not in 0..", length - 1, "; pass ascending token indices");
      }
    }
    total = std::max(total, static_cast<int64_t>(kept[l].size()));
    shorter = shorter || static_cast<int64_t>(kept[l].size()) < length;
  }
  const int64_t pages = pages_for(total);
  // Pages with a slot that gets another token. Those that others hold are replaced: what stays in
  // them moves too.
  std::vector<bool> replaced(static_cast<size_t>(pages), false);
  for (const std::vector<int64_t>& own : kept) {
    for (size_t to = 0; to < own.size(); ++to) {
      if (own[to] != static_cast<int64_t>(to)) replaced[to / page_size_] = true;
    }
  }
  int64_t fresh_needed = 0;
  for (int64_t p = 0; p < pages; ++p) {
    replaced[p] = replaced[p] && allocator_.shared(s.pages[p]);
    fresh_needed += replaced[p];
  }
  const std::vector<int32_t> fresh = allocator_.allocate(fresh_needed);

  std::vector<int32_t> target(s.pages.begin(), s.pages.begin() + pages);
  std::vector<int32_t> given_up(s.pages.begin() + pages, s.pages.end());
  auto next = fresh.begin();
  for (int64_t p = 0; p < pages; ++p) {
    if (!replaced[p]) continue;
    given_up.push_back(s.pages[p]);
    target[p] = *next++;
  }
  Compaction plan;
  for (size_t l = 0; l < kept.size(); ++l) {
    for (size_t i = 0; i < kept[l].size(); ++i) {
      const int64_t from = kept[l][i], to = static_cast<int64_t>(i);
      if (from == to && !replaced[to / page_size_]) continue;
      plan.moves.push_back({s.pages[from / page_size_], static_cast<int32_t>(from % page_size_),
                            target[to / page_size_], static_cast<int32_t>(to % page_size_),
                            each ? static_cast<int32_t>(l) : -1});
    }
  }
  s.pages = std::move(target);
  s.compacted = s.compacted || shorter;
  s.length = total;
  s.lacks.clear();
  for (size_t l = 0; each && l < kept.size(); ++l) {
    s.lacks.push_back(total - static_cast<int64_t>(kept[l].size()));
  }
  if (std::ranges::all_of(s.lacks, [](int64_t n) { return n == 0; })) s.lacks.clear();
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
