// Radix tree over token ids that finds the pages of a prefix somebody has computed before
// (RadixAttention in SGLang, Zheng et al. 2024; ChunkAttention, Ye et al. 2024).
//
// Granularity is one whole page: the symbol of an edge is the `page_size` tokens of a page, and a
// node holds a run of pages that no request has branched off. Keys and values depend on every token
// before them, so a page may be reused only where all tokens up to its end are equal: that is a
// path from the root. Tokens are compared, never only their hashes.
//
// The tree holds one reference to each of its pages. A page that only the tree holds can be
// evicted, ends of the least recently used branches first. Requests in different `space`s (models,
// adapters, tenants) never see each other's prefixes. Not locked.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "host/page_allocator.h"

namespace attnforge::host {

class PrefixTree {
 public:
  PrefixTree(PageAllocator& pages, int64_t page_size);
  ~PrefixTree();

  // Pages of the longest known prefix of `tokens`, whole pages only; marks the path as used.
  std::vector<int32_t> match(int64_t space, std::span<const int64_t> tokens);
  // Remembers `pages` for the whole pages of `tokens`. Where the prefix is known already the tree
  // keeps its own pages. Returns the pages of the path, as match would.
  std::vector<int32_t> insert(int64_t space, std::span<const int64_t> tokens,
                              std::span<const int32_t> pages);
  // Pages that eviction could free now.
  int64_t evictable() const;
  // Frees up to `count` pages, least recently used ends first; returns them.
  std::vector<int32_t> evict(int64_t count);
  int64_t num_pages() const { return held_; }

 private:
  struct Node;
  using Children = std::multimap<uint64_t, std::unique_ptr<Node>>;  // by hash of the first page

  // Where a walk ended: `matched` pages of `node` are on the path.
  struct Place {
    Node* node;
    size_t matched;
    size_t pages;  // of the whole path
  };

  Place walk(int64_t space, std::span<const int64_t> tokens, std::vector<int32_t>& path);
  Node* child(Node& node, std::span<const int64_t> page) const;
  size_t common_pages(const Node& node, std::span<const int64_t> tokens) const;
  void split(Node& node, size_t pages);
  void leaves(Node& node, std::vector<Node*>& out) const;

  PageAllocator& allocator_;
  size_t page_size_;
  std::map<int64_t, std::unique_ptr<Node>> roots_;  // by space
  int64_t held_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace attnforge::host
