// What every file of private CPU operators needs: tensors to params structs, torch's thread pool, a
// workspace. Included by the bindings alone; LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <optional>

#include "cpu/kernels.h"

namespace attnforge::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void run_on_torch_threads(int64_t num_threads, void (*body)(int64_t, void*), void* arg) {
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker, arg);
  });
}

// OpenMP's threads do not survive fork(), and a child that enters a parallel region waits for them
// for ever. A forked child therefore runs on its one thread; results do not depend on their number.
inline bool forked = false;
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

inline Workers workers() {
  if (forked) return {1, run_on_torch_threads};
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run_on_torch_threads};
}

// Asks for huge pages for what lies in large new memory: panels are walked in an order that costs
// a TLB entry per few KiB otherwise, and first touches of small pages take longer than the writes.
inline void advise_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  begin = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void advise_huge_pages(const Tensor& t, int64_t bytes) {
  advise_huge_pages(t.const_data_ptr(), bytes);
}

// Outputs, which may be large and are new.
template <class... Tensors>
void large(const Tensors&... outputs) {
  (advise_huge_pages(outputs, outputs.numel() * outputs.element_size()), ...);
}

// Scratch memory from torch's allocator.
inline Tensor workspace(int64_t bytes) {
  Tensor scratch = torch::stable::empty({std::max<int64_t>(bytes, 64)}, ScalarType::Byte);
  advise_huge_pages(scratch, bytes);
  return scratch;
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "attnforge_native: dtype must be float32, float16 or bfloat16");
  }
  return DType::kFloat32;
}

// The same with fp8, which inputs of forward and decode may be.
inline DType input_dtype_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float8_e4m3fn ? DType::kFloat8 : dtype_of(t);
}

// [B, S, H, D], or varlen [T, H, D] as a batch without a batch stride.
inline TensorRef ref(const Tensor& t, DType dtype) {
  STD_TORCH_CHECK(t.dim() == 3 || t.dim() == 4, "attnforge_native: expected 3 or 4 dimensions");
  STD_TORCH_CHECK(input_dtype_of(t) == dtype, "attnforge_native: tensors differ in dtype");
  int64_t d = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(d) == 1 || t.size(d) == 1 || t.numel() == 0,
                  "attnforge_native: the last dimension must have stride 1");
  // mutable_data_ptr would trip over read-only inputs; the kernels write through output refs alone.
  void* data = const_cast<void*>(t.const_data_ptr());
  return {data, t.dim() == 4 ? t.stride(0) : 0, t.stride(d - 2), t.stride(d - 1)};
}

inline TensorRef ref(const OptionalTensor& t, DType dtype) {
  return t ? ref(*t, dtype) : TensorRef{};
}

inline RowStatRef stat(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.stride(t.dim() - 1) == 1,
                  "attnforge_native: row statistics must be float32 with unit last stride");
  auto* data = static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
  if (t.dim() == 3) return {data, t.stride(0), t.stride(1)};
  return {data, 0, t.stride(0)};
}

// Varlen rows behind the last sequence belong to nobody; no returned element stays unwritten.
inline void zero_tail(const Tensor& t, const int32_t* cu_seqlens, int64_t batch) {
  if (!cu_seqlens) return;
  TensorRef r = ref(t, dtype_of(t));
  int64_t first = batch > 0 ? std::clamp<int64_t>(cu_seqlens[batch], 0, t.size(0)) : 0;
  int64_t item = t.element_size();
  for (int64_t row = first; row < t.size(0); ++row) {
    for (int64_t head = 0; head < t.size(1); ++head) {
      std::memset(static_cast<char*>(r.data) + (row * r.seq_stride + head * r.head_stride) * item,
                  0, t.size(2) * item);
    }
  }
}

inline void fill_tail(const Tensor& t, const int32_t* cu_seqlens, int64_t batch, float value) {
  if (!cu_seqlens) return;
  RowStatRef r = stat(t);
  int64_t first = batch > 0 ? std::clamp<int64_t>(cu_seqlens[batch], 0, t.size(1)) : 0;
  for (int64_t head = 0; head < t.size(0); ++head) {
    std::fill(r.data + head * r.head_stride + first, r.data + head * r.head_stride + t.size(1),
              value);
  }
}

template <class T>
const T* data(const OptionalTensor& t, ScalarType type) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(
      t->scalar_type() == type && t->is_contiguous(),
      "attnforge_native: index, slope and sink tensors must be contiguous int32/float32");
  return static_cast<const T*>(t->const_data_ptr());
}

struct Scores {
  double softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  bool takes_float8 = false;  // K and V may be fp8, and Q as well
};

inline int64_t window(int64_t size) {
  return std::clamp<int64_t>(size, -1, int64_t{1} << 40);
}

inline FlashProblem problem(const Tensor& q, const Tensor& k, const Tensor& v,
                            const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                            const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
                            const OptionalTensor& sinks, int64_t max_seqlen_q, int64_t max_seqlen_k,
                            const Scores& scores) {
  FlashProblem p;
  p.dtype = p.q_dtype = p.out_dtype = scores.takes_float8 ? input_dtype_of(k) : dtype_of(k);
  if (p.dtype == DType::kFloat8) p.q_dtype = input_dtype_of(q);
  bool varlen = cu_seqlens_q.has_value();
  STD_TORCH_CHECK(varlen == cu_seqlens_k.has_value() && q.dim() == (varlen ? 3 : 4) &&
                      k.dim() == q.dim() && v.dim() == q.dim(),
                  "attnforge_native: q, k, v must be 4-D, or 3-D with both cu_seqlens");
  int64_t h = q.dim() - 2;
  p.batch = varlen ? cu_seqlens_q->numel() - 1 : q.size(0);
  p.seqlen_q = varlen ? max_seqlen_q : q.size(1);
  p.seqlen_k = varlen ? max_seqlen_k : k.size(1);
  p.total_q = varlen ? q.size(0) : 0;
  p.total_k = varlen ? k.size(0) : 0;
  p.heads_q = q.size(h);
  p.heads_k = k.size(h);
  p.head_dim = q.size(h + 1);
  p.v_head_dim = v.size(h + 1);
  STD_TORCH_CHECK(p.heads_k > 0 ? p.heads_q % p.heads_k == 0 : p.heads_q == 0,
                  "attnforge_native: query heads must be a multiple of kv heads");
  STD_TORCH_CHECK(p.head_dim % 8 == 0 && p.v_head_dim % 8 == 0 && p.head_dim <= 576 &&
                      p.v_head_dim <= 1024 && p.head_dim > 0 && p.v_head_dim > 0,
                  "attnforge_native: head dims must be multiples of 8, up to 576 and 1024 for v");
  STD_TORCH_CHECK(k.size(h + 1) == p.head_dim && v.size(h) == p.heads_k && v.size(0) == k.size(0) &&
                      (varlen || (k.size(0) == p.batch && v.size(1) == k.size(1))),
                  "attnforge_native: shapes of q, k and v do not fit");
  STD_TORCH_CHECK(!varlen || cu_seqlens_k->numel() == p.batch + 1,
                  "attnforge_native: cu_seqlens_q and cu_seqlens_k differ in length");
  STD_TORCH_CHECK(!seqused_k || seqused_k->numel() == p.batch,
                  "attnforge_native: seqused_k must have one entry per sequence");
  p.cu_seqlens_q = data<int32_t>(cu_seqlens_q, ScalarType::Int);
  p.cu_seqlens_k = data<int32_t>(cu_seqlens_k, ScalarType::Int);
  p.seqused_k = data<int32_t>(seqused_k, ScalarType::Int);
  p.alibi_slopes = data<float>(alibi_slopes, ScalarType::Float);
  if (alibi_slopes && alibi_slopes->dim() == 2) p.alibi_batch_stride = p.heads_q;
  STD_TORCH_CHECK(
      !alibi_slopes || alibi_slopes->numel() == p.heads_q * (p.alibi_batch_stride ? p.batch : 1),
      "attnforge_native: alibi_slopes must be [heads] or [batch, heads]");
  p.sinks = data<float>(sinks, ScalarType::Float);
  STD_TORCH_CHECK(!sinks || sinks->numel() == p.heads_q,
                  "attnforge_native: sinks must have one entry per query head");
  p.softmax_scale = static_cast<float>(scores.softmax_scale);
  p.softcap = static_cast<float>(scores.softcap);
  p.window_left = window(scores.window_left);
  p.window_right = window(scores.window_right);
  return p;
}

inline bool empty(const FlashProblem& p) {
  return p.batch <= 0 || p.heads_q == 0;
}

}  // namespace attnforge::cpu
