// Private CPU operators of the paged family (namespace attnforge_native): see ops_cpu.cpp.
#include <limits>

#include "bindings/paged.h"

namespace attnforge::cpu {
namespace {

void clear_tail(const Tensor& out, const Tensor& lse, const int32_t* ends, int64_t batch) {
  const int64_t first = std::clamp<int64_t>(ends[batch], 0, out.size(0));
  const int64_t row = out.size(1) * out.size(2) * out.element_size();
  std::memset(static_cast<char*>(out.mutable_data_ptr()) + first * row, 0,
              (out.size(0) - first) * row);
  auto* stats = static_cast<float*>(lse.mutable_data_ptr());
  for (int64_t h = 0; h < lse.size(0); ++h) {
    std::fill(stats + h * lse.size(1) + first, stats + (h + 1) * lse.size(1),
              -std::numeric_limits<float>::infinity());
  }
}

using Sizes = int64_t (*)(const PagedFwdParams&, int64_t);
using Kernel = void (*)(const PagedFwdParams&, const Workers&);

void run(PagedFwdParams& params, Sizes bytes, Kernel kernel) {
  const Workers threads = workers();
  Tensor scratch = workspace(bytes(params, threads.num_threads));
  params.flash.workspace = scratch.mutable_data_ptr();
  kernel(params, threads);
}

// Sequences by their rows per kv head: decode up to kFewRows, splits of packed tiles up to
// kSomeRows, else tiles over K and V that are packed once. The route is chosen per sequence, so
// that a request's result does not depend on its neighbours.
void run_routes(PagedFwdParams& params, int64_t longest, bool mixed) {
  const KernelTable& table = kernels();
  FlashFwdParams& f = params.flash;
  if (longest > kSomeRows) {
    f.route = RowRoute::kManyRows, f.few_rows = kSomeRows;
    run(params, table.paged_prefill_workspace, table.paged_prefill);
  }
  f.few_rows = kFewRows;
  if (longest > kFewRows && (mixed || longest <= kSomeRows)) {
    f.route = RowRoute::kManyRows, f.most_rows = kSomeRows;
    run(params, table.paged_middle_workspace, table.paged_middle);
  }
  if (mixed || longest <= kFewRows) {
    f.route = RowRoute::kFewRows;
    run(params, table.paged_decode_workspace, table.paged_decode);
  }
}

// max_seqlen_k bounds the lengths; out may be fp32 whatever q is.
void paged_fwd(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
               const Tensor& lengths, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
               const OptionalTensor& k_zero, const OptionalTensor& v_zero,
               const OptionalTensor& cu_seqlens_q, const OptionalTensor& alibi_slopes,
               const OptionalTensor& sinks, const OptionalTensor& mask, const Tensor& out,
               const Tensor& lse, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
               int64_t window_left, int64_t window_right, double softcap, int64_t num_splits,
               const OptionalTensor& split_pieces, const OptionalTensor& split_first) {
  PagedFwdParams params =
      paged_fwd_params(q, k_pages, v_pages, table, lengths, {k_scale, v_scale, k_zero, v_zero},
                       cu_seqlens_q, alibi_slopes, sinks, mask, out, lse, max_seqlen_q,
                       max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  FlashProblem& p = params.flash.problem;
  const bool packed = cu_seqlens_q.has_value();
  if (packed) clear_tail(out, lse, p.cu_seqlens_q, p.batch);
  if (empty(p)) return;
  params.flash.q = ref(q, p.dtype);
  p.out_dtype = dtype_of(out);
  STD_TORCH_CHECK(p.out_dtype == p.dtype || p.out_dtype == DType::kFloat32,
                  "attnforge_native: out must be of q's dtype or float32");
  params.flash.out = ref(out, p.out_dtype);
  params.flash.lse = stat(lse);
  params.flash.num_splits = std::clamp<int64_t>(num_splits, 0, std::max<int64_t>(p.seqlen_k, 1));
  const Pieces pieces = pieces_of(split_pieces, split_first, p.batch);  // the values were checked
  params.flash.plan = {pieces.first, pieces.begin, pieces.end};
  run_routes(params, p.seqlen_q * (p.heads_q / p.heads_k), packed);
}

void paged_append(const Tensor& k, const OptionalTensor& v, const Tensor& k_pages,
                  const OptionalTensor& v_pages, const Tensor& table, const Tensor& lengths,
                  const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                  const OptionalTensor& k_zero, const OptionalTensor& v_zero,
                  const OptionalTensor& cu_seqlens, const OptionalTensor& rope_cos,
                  const OptionalTensor& rope_sin, const OptionalTensor& positions,
                  bool rope_interleaved, const OptionalTensor& page_min,
                  const OptionalTensor& page_max) {
  const PagedAppendParams p = paged_append_params(
      k, v, k_pages, v_pages, table, lengths, k_scale, v_scale, k_zero, v_zero, cu_seqlens,
      rope_cos, rope_sin, positions, rope_interleaved, page_min, page_max);
  if (p.batch > 0 && p.pool.pages > 0) kernels().paged_append(p, workers());
}

}  // namespace
}  // namespace attnforge::cpu

#define ATTNFORGE_CACHE                                                                          \
  "Tensor block_table, Tensor cache_seqlens, Tensor? k_scale, Tensor? v_scale, Tensor? k_zero, " \
  "Tensor? v_zero, "

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def("paged_fwd(Tensor q, Tensor k_pages, Tensor v_pages, " ATTNFORGE_CACHE
        "Tensor? cu_seqlens_q, Tensor? alibi_slopes, Tensor? sinks, Tensor? mask, Tensor(a!) out, "
        "Tensor(b!) lse, int max_seqlen_q, int max_seqlen_k, float softmax_scale, int window_left, "
        "int window_right, float softcap, int num_splits, Tensor? split_pieces, Tensor? "
        "split_first) -> ()");
  m.def(
      "paged_append(Tensor k, Tensor? v, Tensor(a!) k_pages, Tensor(b!)? v_pages, " ATTNFORGE_CACHE
      "Tensor? cu_seqlens, Tensor? rope_cos, Tensor? rope_sin, Tensor? positions, bool "
      "rope_interleaved, Tensor(c!)? page_min, Tensor(d!)? page_max) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("paged_fwd", TORCH_BOX(&attnforge::cpu::paged_fwd));
  m.impl("paged_append", TORCH_BOX(&attnforge::cpu::paged_append));
}
