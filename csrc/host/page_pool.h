// The host side of a paged cache: allocator, sequences and prefix tree behind one lock.
//
// Every call is atomic: it happens as a whole or, with an error, not at all, also when threads
// share a pool. Where pages run short, remembered prefixes that nobody uses are evicted first.
// Calls that free pages return them, so that whoever holds the tensors can poison them.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "host/page_allocator.h"
#include "host/prefix_tree.h"
#include "host/sequences.h"

namespace attnforge::host {

struct PoolCounters {
  int64_t prompt_tokens = 0;  // asked of the tree when sequences were made
  int64_t prefix_tokens = 0;  // of these found
  int64_t pages_copied = 0;   // copy-on-write
  int64_t pages_evicted = 0;
};

struct PoolState {
  int64_t num_pages, free_pages, prefix_pages, evictable_pages, sequences;
  PoolCounters counters;
};

class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t page_size, int64_t lanes);

  // Single pages, for callers with tables of their own.
  std::vector<int32_t> allocate(int64_t count);
  void share(std::span<const int32_t> pages);
  std::vector<int32_t> release(std::span<const int32_t> pages);
  int32_t references(int32_t page) const;

  // A sequence that starts with the pages of the longest known prefix of `tokens`: (id, tokens).
  std::pair<int64_t, int64_t> create(std::span<const int64_t> tokens, int64_t space);
  int64_t match_prefix(std::span<const int64_t> tokens, int64_t space);
  // Remembers the whole pages of `tokens`, the first tokens of sequence `id`; where they are known
  // already the sequence takes the known pages. Returns the pages freed.
  std::vector<int32_t> commit(int64_t id, std::span<const int64_t> tokens, int64_t space);
  int64_t fork(int64_t id);
  std::vector<int32_t> free(int64_t id);

  struct Extension {
    std::vector<PageCopy> copies;
    std::vector<int32_t> evicted;
  };
  Extension extend(std::span<const int64_t> ids, std::span<const int64_t> counts);
  std::vector<int32_t> truncate(int64_t id, int64_t length);
  // keep and scores [length] for all lanes alike, or keep [lanes] and scores [lanes, length]: a
  // lane that is shorter has scores for its first tokens only. No scores: all are equal.
  Compaction compact(int64_t id, std::span<const double> scores, std::span<const int64_t> keep,
                     int64_t sink, int64_t recent);
  std::vector<int32_t> evict(int64_t count);

  int64_t page_size() const { return page_size_; }
  std::vector<int32_t> pages(int64_t id) const;
  // Of the longest lane.
  std::vector<int32_t> lengths(std::span<const int64_t> ids) const;
  // [ids, lanes]; empty where no sequence has lanes of different lengths.
  std::vector<int32_t> lane_lengths(std::span<const int64_t> ids) const;
  // [ids, columns] row-major, -1 after a sequence's last page; columns 0 is the least that fits.
  std::vector<int32_t> block_table(std::span<const int64_t> ids, int64_t columns) const;
  PoolState state() const;

 private:
  std::vector<int32_t> make_room(int64_t pages);

  mutable std::mutex lock_;
  int64_t page_size_;
  PageAllocator allocator_;
  PrefixTree tree_;
  Sequences sequences_;
  PoolCounters counters_;
};

}  // namespace attnforge::host
