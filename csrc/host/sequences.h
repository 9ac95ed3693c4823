// Sequences of one pool: which pages hold the tokens of each, and how many.
//
// A sequence of n tokens has exactly ceil(n / page_size) pages; token t lies in slot t % page_size
// of its page t / page_size. Forks share pages, so writing to a page that is shared is preceded by
// a copy. This class decides what is to be copied and moved; whoever holds the tensors does it.
//
// A token's slot has a part for each lane: a KV head of a layer, say. Compaction may leave lanes of
// different lengths, which lie in the same pages: lane l has its own tokens in the first
// lane_length(l) slots, and the pages are those of the longest lane. New tokens go to all lanes.
//
// Ids count up and are never used again, so that an id freed twice, or of another pool, is an error
// and not another request's sequence. Not locked.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "host/page_allocator.h"

namespace attnforge::host {

struct PageCopy {
  int32_t from;
  int32_t to;
};

// One token's slot moves, in one lane or (-1) in all; all are read before any is written.
struct SlotMove {
  int32_t from_page;
  int32_t from_slot;
  int32_t to_page;
  int32_t to_slot;
  int32_t lane;
};

struct Compaction {
  std::vector<SlotMove> moves;
  std::vector<int32_t> freed;
};

class Sequences {
 public:
  Sequences(PageAllocator& pages, int64_t page_size, int64_t lanes);

  // A sequence whose first pages are `prefix`, full; takes over the caller's references.
  int64_t create(std::span<const int32_t> prefix);
  int64_t fork(int64_t id);
  // Returns the pages that became free.
  std::vector<int32_t> free(int64_t id);

  // Free pages that extend(ids, counts) needs.
  int64_t pages_needed(std::span<const int64_t> ids, std::span<const int64_t> counts) const;
  // Room for `counts` more tokens at the ends of `ids`, in all of them or (OutOfPages) in none.
  // Returns the copies to make before anything is written.
  std::vector<PageCopy> extend(std::span<const int64_t> ids, std::span<const int64_t> counts);
  // Forgets the last tokens, down to `length` in the longest lane; returns the pages freed.
  std::vector<int32_t> truncate(int64_t id, int64_t length);
  // Keeps the tokens `kept` (ascending) of all lanes, or of each lane its own, and closes the gaps.
  Compaction compact(int64_t id, std::span<const std::vector<int64_t>> kept);
  // Takes `pages` (full, of equal content) in place of the first pages; returns pages freed.
  std::vector<int32_t> adopt(int64_t id, std::span<const int32_t> pages);
  // Whether tokens have been taken out: then slots no longer say which prefix they belong to.
  bool compacted(int64_t id) const { return at("commit", id).compacted; }

  int64_t lanes() const { return lanes_; }
  int64_t length(int64_t id) const { return at("length", id).length; }  // of the longest lane
  bool ragged(int64_t id) const { return !at("lengths", id).lacks.empty(); }
  int64_t lane_length(int64_t id, int64_t lane) const { return at("lengths", id).lane(lane); }
  const std::vector<int32_t>& pages(int64_t id) const { return at("pages", id).pages; }
  int64_t count() const { return static_cast<int64_t>(table_.size()); }

 private:
  struct Sequence {
    std::vector<int32_t> pages;
    int64_t length = 0;
    std::vector<int64_t> lacks;  // by how much each lane is shorter; empty where none is
    bool compacted = false;

    int64_t lane(int64_t l) const { return length - (lacks.empty() ? 0 : lacks[l]); }
  };

  const Sequence& at(const char* who, int64_t id) const;
  Sequence& at(const char* who, int64_t id);
  int64_t pages_for(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  std::vector<size_t> shared_targets(const Sequence& s, int64_t more) const;

  PageAllocator& allocator_;
  int64_t page_size_, lanes_;
  int64_t next_id_ = 1;
  std::unordered_map<int64_t, Sequence> table_;
};

}  // namespace attnforge::host
