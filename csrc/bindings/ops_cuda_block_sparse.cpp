// Private CUDA operators of the block_sparse family: see ops_cuda.cpp. Lists are ascending and free
// of repetitions; `first` says where the list rows of packed sequences begin.
#include "bindings/cuda.h"
#include "cuda/block_sparse/launch.h"

namespace attnforge::cuda {
namespace {

const int32_t* ints(const Tensor& t) {
  return data<int32_t>(OptionalTensor(t), ScalarType::Int);
}

BlockListRef lists_of(const FlashProblem& p, const Tensor& ids, const Tensor& counts,
                      const OptionalTensor& first, int64_t q_block, int64_t kv_block) {
  STD_TORCH_CHECK(ids.dim() == 4 && counts.numel() * ids.size(3) == ids.numel(),
                  "attnforge_native: want ids [B | 1, heads, rows, slots] and one count per list");
  STD_TORCH_CHECK(
      first.has_value() == (p.cu_seqlens_q != nullptr) && (!first || first->numel() == p.batch + 1),
      "attnforge_native: first rows go with packed sequences, one per sequence");
  STD_TORCH_CHECK(q_block > 0 && kv_block > 0, "attnforge_native: blocks must not be empty");
  const int64_t batch = ids.size(0), heads = ids.size(1);
  STD_TORCH_CHECK(heads == 1 || heads == p.heads_k || heads == p.heads_q,
                  "attnforge_native: lists must be per query head, per kv head, or one");
  STD_TORCH_CHECK(batch == 1 || (batch == p.batch && !first),
                  "attnforge_native: lists of another batch");
  BlockListRef lists;
  lists.ids = ints(ids), lists.counts = ints(counts);
  lists.first = data<int32_t>(first, ScalarType::Int);
  lists.rows = ids.size(2), lists.slots = ids.size(3);
  lists.batch = batch > 1 ? heads * lists.rows : 0;
  lists.head = heads > 1 ? lists.rows : 0;
  lists.q_block = q_block, lists.kv_block = kv_block;
  lists.pack = heads == p.heads_q && heads > 1 ? 1 : p.heads_q / p.heads_k;
  return lists;
}

void fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ids, const Tensor& counts,
         const OptionalTensor& first, const OptionalTensor& cu_seqlens_q,
         const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
         const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const Tensor& out,
         const Tensor& lse, const OptionalTensor& out_lo, int64_t max_seqlen_q,
         int64_t max_seqlen_k, double softmax_scale, int64_t window_left, int64_t window_right,
         double softcap, int64_t q_block, int64_t kv_block, int64_t stream) {
  FlashFwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  if (empty(p)) return;
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v"), check_aligned(out, "out");
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype), params.out_lo = ref(out_lo, p.dtype);
  params.lse = stat(lse);
  const BlockListRef lists = lists_of(p, ids, counts, first, q_block, kv_block);
  check(with_dtype(p.dtype,
                   [&]<DType kDType>() {
                     return block_sparse_fwd<kDType>(params, lists, stream_of(stream));
                   }),
        "cuda_block_sparse_fwd");
}

void bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
         const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo,
         const Tensor& ids, const Tensor& counts, const OptionalTensor& first, const Tensor& rows,
         const Tensor& starts, const OptionalTensor& cu_seqlens_q,
         const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
         const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const Tensor& dq,
         const Tensor& dk, const Tensor& dv, const Tensor& delta, int64_t max_seqlen_q,
         int64_t max_seqlen_k, double softmax_scale, int64_t window_left, int64_t window_right,
         double softcap, int64_t q_block, int64_t kv_block, int64_t each, int64_t stream) {
  FlashBwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  if (empty(p)) return;
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v");
  check_aligned(dout, "dout");
  check_aligned(dq, "dq"), check_aligned(dk, "dk"), check_aligned(dv, "dv");
  params.dout = ref(dout, p.dtype);
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype), params.out_lo = ref(out_lo, p.dtype);
  params.dq = ref(dq, p.dtype), params.dk = ref(dk, p.dtype), params.dv = ref(dv, p.dtype);
  params.lse = stat(lse);
  if (dlse) params.dlse = stat(*dlse);
  params.delta = stat(delta);
  const BlockListRef lists = lists_of(p, ids, counts, first, q_block, kv_block);
  const int64_t list_heads = ids.size(0) * ids.size(1);
  STD_TORCH_CHECK(
      rows.numel() == ids.numel() && starts.dim() == 3 &&
          starts.size(0) * starts.size(1) == list_heads && starts.size(2) > 0 && each >= 0 &&
          each * (p.batch - 1) < starts.size(2),
      "attnforge_native::cuda_block_sparse_bwd: rows and starts are not of these lists");
  InverseRef inverse;
  inverse.rows = ints(rows), inverse.starts = ints(starts);
  inverse.batch = ids.size(0) > 1 ? ids.size(1) : 0;
  inverse.head = ids.size(1) > 1 ? 1 : 0;
  inverse.entries = lists.rows * lists.slots;
  inverse.blocks = starts.size(2) - 1, inverse.each = each;
  check(with_dtype(p.dtype,
                   [&]<DType kDType>() {
                     void* on = stream_of(stream);
                     if (const int error = flash_delta<kDType>(params, on)) return error;
                     if (const int error = block_sparse_dq<kDType>(params, lists, on)) return error;
                     return block_sparse_dkdv<kDType>(params, lists, inverse, on);
                   }),
        "cuda_block_sparse_bwd");
}

}  // namespace
}  // namespace attnforge::cuda

#define ATTNFORGE_LISTS "Tensor ids, Tensor counts, Tensor? first, "
#define ATTNFORGE_PROBLEM                                                                         \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? alibi_slopes, Tensor? " \
  "sinks, "
#define ATTNFORGE_SCALARS                                                                        \
  "int max_seqlen_q, int max_seqlen_k, float softmax_scale, int window_left, int window_right, " \
  "float softcap, int q_block, int kv_block, "

STABLE_TORCH_LIBRARY_FRAGMENT(ATTNFORGE_NAMESPACE, m) {
  m.def("cuda_block_sparse_fwd(Tensor q, Tensor k, Tensor v, " ATTNFORGE_LISTS ATTNFORGE_PROBLEM
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? out_lo, " ATTNFORGE_SCALARS
        "int stream) -> ()");
  m.def(
      "cuda_block_sparse_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? out_lo, " ATTNFORGE_LISTS
      "Tensor rows, Tensor starts, " ATTNFORGE_PROBLEM
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) delta, " ATTNFORGE_SCALARS
      "int each, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFORGE_NAMESPACE, ATTNFORGE_KEY, m) {
  m.impl("cuda_block_sparse_fwd", TORCH_BOX(&attnforge::cuda::fwd));
  m.impl("cuda_block_sparse_bwd", TORCH_BOX(&attnforge::cuda::bwd));
}
