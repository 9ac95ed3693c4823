#include "host/prefix_tree.h"

#include <algorithm>
#include <utility>

#include "host/errors.h"

namespace attnforge::host {

struct PrefixTree::Node {
  Node* parent = nullptr;
  std::vector<int64_t> tokens;  // page_size per page
  std::vector<int32_t> pages;
  Children children;
  uint64_t used = 0;
};

namespace {

// FNV-1a over 64-bit words: it only spreads children; equality is decided by the tokens.
uint64_t hash(std::span<const int64_t> tokens) {
  uint64_t h = 0xcbf29ce484222325u;
  for (const int64_t token : tokens) h = (h ^ static_cast<uint64_t>(token)) * 0x100000001b3u;
  return h;
}

}  // namespace

PrefixTree::PrefixTree(PageAllocator& pages, int64_t page_size)
    : allocator_(pages), page_size_(static_cast<size_t>(page_size)) {}

PrefixTree::~PrefixTree() {
  // Long chains of nodes would be destroyed by recursion: take them apart first.
  std::vector<std::unique_ptr<Node>> open;
  for (auto& [space, root] : roots_) open.push_back(std::move(root));
  while (!open.empty()) {
    const std::unique_ptr<Node> node = std::move(open.back());
    open.pop_back();
    for (auto& [key, below] : node->children) open.push_back(std::move(below));
  }
}

PrefixTree::Node* PrefixTree::child(Node& node, std::span<const int64_t> page) const {
  const auto [first, last] = node.children.equal_range(hash(page));
  for (auto it = first; it != last; ++it) {
    if (std::equal(page.begin(), page.end(), it->second->tokens.begin())) return it->second.get();
  }
  return nullptr;
}

size_t PrefixTree::common_pages(const Node& node, std::span<const int64_t> tokens) const {
  const size_t limit = std::min(node.tokens.size(), tokens.size());
  const auto differ =
      std::mismatch(tokens.begin(), tokens.begin() + limit, node.tokens.begin()).first;
  return static_cast<size_t>(differ - tokens.begin()) / page_size_;
}

PrefixTree::Place PrefixTree::walk(int64_t space, std::span<const int64_t> tokens,
                                   std::vector<int32_t>& path) {
  std::unique_ptr<Node>& root = roots_[space];
  if (!root) root = std::make_unique<Node>();
  ++clock_;
  Place place{root.get(), 0, 0};
  std::span<const int64_t> rest = tokens.first(tokens.size() / page_size_ * page_size_);
  while (!rest.empty()) {
    Node* next = child(*place.node, rest.first(page_size_));
    if (next == nullptr) break;
    next->used = clock_;
    place = {next, common_pages(*next, rest), place.pages};
    place.pages += place.matched;
    path.insert(path.end(), next->pages.begin(), next->pages.begin() + place.matched);
    if (place.matched < next->pages.size()) break;
    rest = rest.subspan(place.matched * page_size_);
  }
  return place;
}

std::vector<int32_t> PrefixTree::match(int64_t space, std::span<const int64_t> tokens) {
  std::vector<int32_t> path;
  walk(space, tokens, path);
  return path;
}

// `node` keeps its first `pages` pages; the rest moves into a child that takes over its children.
void PrefixTree::split(Node& node, size_t pages) {
  auto tail = std::make_unique<Node>();
  tail->parent = &node;
  tail->used = node.used;
  tail->tokens.assign(node.tokens.begin() + pages * page_size_, node.tokens.end());
  tail->pages.assign(node.pages.begin() + pages, node.pages.end());
  tail->children = std::move(node.children);
  for (auto& [key, below] : tail->children) below->parent = tail.get();
  node.tokens.resize(pages * page_size_);
  node.pages.resize(pages);
  node.children.clear();
  const uint64_t key = hash(std::span(tail->tokens).first(page_size_));
  node.children.emplace(key, std::move(tail));
}

std::vector<int32_t> PrefixTree::insert(int64_t space, std::span<const int64_t> tokens,
                                        std::span<const int32_t> pages) {
  const size_t whole = tokens.size() / page_size_;
  if (pages.size() < whole) {
    refuse("insert: ", tokens.size(), " tokens fill ", whole, " pages of ", page_size_,
           ", but there are ", pages.size(), " page ids; pass one id per whole page");
  }
  std::vector<int32_t> path;
  const Place place = walk(space, tokens, path);
  const auto fresh = pages.subspan(place.pages, whole - place.pages);
  if (fresh.empty()) return path;
  allocator_.share(fresh);
  held_ += static_cast<int64_t>(fresh.size());
  path.insert(path.end(), fresh.begin(), fresh.end());
  const auto rest = tokens.subspan(place.pages * page_size_, fresh.size() * page_size_);
  Node& node = *place.node;
  if (place.matched < node.pages.size()) split(node, place.matched);
  // An end that is continued grows; anything else branches.
  if (node.parent != nullptr && node.children.empty()) {
    node.tokens.insert(node.tokens.end(), rest.begin(), rest.end());
    node.pages.insert(node.pages.end(), fresh.begin(), fresh.end());
    return path;
  }
  auto branch = std::make_unique<Node>();
  branch->parent = &node;
  branch->used = clock_;
  branch->tokens.assign(rest.begin(), rest.end());
  branch->pages.assign(fresh.begin(), fresh.end());
  node.children.emplace(hash(rest.first(page_size_)), std::move(branch));
  return path;
}

void PrefixTree::leaves(Node& node, std::vector<Node*>& out) const {
  std::vector<Node*> open{&node};
  while (!open.empty()) {
    Node* top = open.back();
    open.pop_back();
    if (top->children.empty() && top->parent != nullptr) out.push_back(top);
    for (auto& [key, below] : top->children) open.push_back(below.get());
  }
}

// A page counts when everything after it on every branch can go first.
int64_t PrefixTree::evictable() const {
  std::map<const Node*, bool> blocked;  // a page in use lies below
  int64_t count = 0;
  for (const auto& [space, root] : roots_) {
    std::vector<const Node*> order{root.get()};  // parents before children
    for (size_t i = 0; i < order.size(); ++i) {
      for (const auto& [key, below] : order[i]->children) order.push_back(below.get());
    }
    for (size_t i = order.size(); i-- > 1;) {
      const Node& node = *order[i];
      size_t keep = blocked[&node] ? node.pages.size() : 0;
      for (size_t p = node.pages.size(); p > keep; --p) {
        if (allocator_.shared(node.pages[p - 1])) keep = p;
      }
      count += static_cast<int64_t>(node.pages.size() - keep);
      if (keep > 0) blocked[node.parent] = true;
    }
  }
  return count;
}

std::vector<int32_t> PrefixTree::evict(int64_t count) {
  std::vector<int32_t> freed;
  const auto wanted = static_cast<size_t>(std::max<int64_t>(count, 0));
  // Oldest last. A parent becomes an end when its children are gone; it is at least as recently
  // used as they were, so it goes to its place among the others.
  std::vector<Node*> ends;
  for (auto& [space, root] : roots_) leaves(*root, ends);
  const auto newer = [](const Node* a, const Node* b) { return a->used > b->used; };
  std::stable_sort(ends.begin(), ends.end(), newer);
  while (freed.size() < wanted && !ends.empty()) {
    Node* node = ends.back();
    ends.pop_back();
    std::vector<int32_t> dropped;
    while (!node->pages.empty() && freed.size() + dropped.size() < wanted &&
           !allocator_.shared(node->pages.back())) {
      dropped.push_back(node->pages.back());
      node->pages.pop_back();
    }
    const std::vector<int32_t> now = allocator_.release(dropped);
    freed.insert(freed.end(), now.begin(), now.end());
    held_ -= static_cast<int64_t>(dropped.size());
    if (!node->pages.empty()) {
      node->tokens.resize(node->pages.size() * page_size_);
      continue;
    }
    Node* parent = node->parent;
    const auto [first, last] =
        parent->children.equal_range(hash(std::span(node->tokens).first(page_size_)));
    for (auto it = first; it != last; ++it) {
      if (it->second.get() == node) {
        parent->children.erase(it);
        break;
      }
    }
    if (parent->parent != nullptr && parent->children.empty()) {
      ends.insert(std::lower_bound(ends.begin(), ends.end(), parent, newer), parent);
    }
  }
  return freed;
}

}  // namespace attnforge::host
