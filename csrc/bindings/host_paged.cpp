// attnforge._host, the paged part: page pool and split plan. Integers and their lists come in;
// tables go out as bytearrays of int32, which torch.frombuffer and numpy.frombuffer read in place.
//
// Every call lets go of the GIL before it takes the pool's lock, so that no thread waits for one
// while it holds the other.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "host/errors.h"
#include "host/page_pool.h"
#include "host/split_plan.h"

namespace py = pybind11;

namespace attnforge::host {
namespace {

using Ids = std::vector<int64_t>;
using Pages = std::vector<int32_t>;
using NoGil = py::call_guard<py::gil_scoped_release>;

py::bytearray bytes(const std::vector<int32_t>& values) {
  return py::bytearray(reinterpret_cast<const char*>(values.data()), values.size() * 4);
}

template <class Call>
auto without_gil(Call&& call) {
  const py::gil_scoped_release release;
  return call();
}

py::tuple extend(PagePool& pool, const Ids& ids, const Ids& counts) {
  const auto result = without_gil([&] { return pool.extend(ids, counts); });
  Pages from, to;
  for (const PageCopy& copy : result.copies) {
    from.push_back(copy.from);
    to.push_back(copy.to);
  }
  return py::make_tuple(from, to, result.evicted);
}

py::tuple compact(PagePool& pool, int64_t id, const std::vector<double>& scores,
                  const std::variant<int64_t, Ids>& keep, int64_t sink, int64_t recent) {
  const Ids kept = keep.index() == 0 ? Ids{std::get<0>(keep)} : std::get<1>(keep);
  const auto plan = without_gil([&] { return pool.compact(id, scores, kept, sink, recent); });
  std::vector<int32_t> moves;
  moves.reserve(plan.moves.size() * 5);
  for (const SlotMove& m : plan.moves) {
    moves.insert(moves.end(), {m.from_page, m.from_slot, m.to_page, m.to_slot, m.lane});
  }
  return py::make_tuple(bytes(moves), plan.freed);
}

py::dict state(const PagePool& pool) {
  const PoolState s = without_gil([&] { return pool.state(); });
  py::dict out;
  out["num_pages"] = s.num_pages;
  out["free_pages"] = s.free_pages;
  out["prefix_pages"] = s.prefix_pages;
  out["evictable_pages"] = s.evictable_pages;
  out["sequences"] = s.sequences;
  out["prompt_tokens"] = s.counters.prompt_tokens;
  out["prefix_tokens"] = s.counters.prefix_tokens;
  out["pages_copied"] = s.counters.pages_copied;
  out["pages_evicted"] = s.counters.pages_evicted;
  return out;
}

void bind_pool(py::module_& m) {
  py::class_<PagePool>(m, "PagePool", "Pages, sequences and known prefixes of one paged cache.")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("num_pages"), py::arg("page_size"),
           py::arg("lanes") = 1)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def(
          "allocate", [](PagePool& p, int64_t n) { return p.allocate(n); }, py::arg("count"),
          NoGil(), "count pages with one reference each; OutOfPages if there are not as many.")
      .def(
          "share", [](PagePool& p, const Pages& ids) { p.share(ids); }, py::arg("pages"), NoGil(),
          "One more reference to each page.")
      .def(
          "release", [](PagePool& p, const Pages& ids) { return p.release(ids); }, py::arg("pages"),
          NoGil(), "One reference less to each page; the pages freed by it.")
      .def("references", &PagePool::references, py::arg("page"), NoGil())
      .def(
          "need_copy", [](const PagePool& p, int32_t page) { return p.references(page) > 1; },
          py::arg("page"), NoGil(), "Whether a writer must take a copy of the page first.")
      .def(
          "create",
          [](PagePool& p, const Ids& tokens, int64_t space) { return p.create(tokens, space); },
          py::arg("tokens") = Ids{}, py::arg("space") = 0, NoGil(),
          "(id, tokens found): a sequence that starts with the longest known prefix of tokens.")
      .def(
          "match_prefix",
          [](PagePool& p, const Ids& tokens, int64_t space) {
            return p.match_prefix(tokens, space);
          },
          py::arg("tokens"), py::arg("space") = 0, NoGil(), "Tokens of the longest known prefix.")
      .def(
          "commit",
          [](PagePool& p, int64_t id, const Ids& tokens, int64_t space) {
            return p.commit(id, tokens, space);
          },
          py::arg("id"), py::arg("tokens"), py::arg("space") = 0, NoGil(),
          "Remember the whole pages of a sequence's first tokens; the pages freed by it.")
      .def("fork", &PagePool::fork, py::arg("id"), NoGil())
      .def("free", &PagePool::free, py::arg("id"), NoGil(), "The pages freed by it.")
      .def("extend", &extend, py::arg("ids"), py::arg("counts"),
           "Room for more tokens: (pages to copy from, to, pages evicted).")
      .def("truncate", &PagePool::truncate, py::arg("id"), py::arg("length"), NoGil(),
           "Forget the last tokens, down to length in the longest lane; the pages freed by it.")
      .def("compact", &compact, py::arg("id"), py::arg("scores"), py::arg("keep"),
           py::arg("sink") = 0, py::arg("recent") = 0,
           "Keep the tokens of highest score: (moves int32 [n, 5], pages freed); a move is page "
           "and slot from, page and slot to, and the lane (-1: all); all are read before any is "
           "written. keep may be one per lane, with scores [lanes, length], flat. No scores: all "
           "are equal.")
      .def("evict", &PagePool::evict, py::arg("count"), NoGil(),
           "Free up to count pages of prefixes that nobody uses; returns them.")
      .def("pages", &PagePool::pages, py::arg("id"), NoGil())
      .def(
          "lengths",
          [](const PagePool& p, const Ids& ids) {
            return bytes(without_gil([&] { return p.lengths(ids); }));
          },
          py::arg("ids"), "int32 [ids] as bytes: of the longest lanes.")
      .def(
          "lane_lengths",
          [](const PagePool& p, const Ids& ids) {
            return bytes(without_gil([&] { return p.lane_lengths(ids); }));
          },
          py::arg("ids"),
          "int32 [ids, lanes] as bytes; empty where all lanes are as long as the sequence.")
      .def(
          "block_table",
          [](const PagePool& p, const Ids& ids, int64_t columns) {
            return bytes(without_gil([&] { return p.block_table(ids, columns); }));
          },
          py::arg("ids"), py::arg("columns") = 0,
          "int32 [ids, columns] as bytes, -1 after the last page; 0 columns is as few as fit.")
      .def("state", &state, "Counts of pages, sequences, prefix hits, copies and evictions.");
}

void bind_plan(py::module_& m) {
  py::class_<SplitPlan>(
      m, "SplitPlan", py::buffer_protocol(),
      "Pieces of keys for a fixed number of workers. Its buffer is int32: sequence (-1 where "
      "unused), first token and end of each piece [3, max_pieces], then the first piece of each "
      "sequence [max_batch + 1]. It stays in place: a view sees every later plan.")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("max_batch"), py::arg("max_pieces"),
           py::arg("page_size"))
      .def(
          "plan", [](SplitPlan& p, const Ids& lengths, int64_t fixed) { p.plan(lengths, fixed); },
          py::arg("lengths"), py::arg("fixed") = 0,
          "Plan for these lengths [batch]; fixed: tokens per piece, or 0 for balanced pieces.")
      .def_property_readonly("piece", &SplitPlan::piece, "Tokens per piece of the last plan.")
      .def_buffer([](SplitPlan& p) {
        return py::buffer_info(p.table().data(), static_cast<py::ssize_t>(p.table().size()));
      });
}

}  // namespace

void bind_paged(py::module_& m) {
  py::register_exception<OutOfPages>(m, "OutOfPages", PyExc_RuntimeError);
  bind_pool(m);
  bind_plan(m);
}

}  // namespace attnforge::host
