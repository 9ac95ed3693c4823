// Private CPU operators (namespace attnforge_native) over the torch-free kernels: unpack tensors
// into params structs, lend torch's thread pool and a workspace, call. LibTorch stable ABI only.
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
#include <chrono>
#include <cstring>
#include <limits>
#include <optional>
#include <string>

#include "cpu/kernels.h"

namespace attnforge::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void run_on_torch_threads(int64_t num_threads, void (*body)(int64_t, void*), void* arg) {
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker, arg);
  });
}

// OpenMP's threads do not survive fork(), and a child that enters a parallel region waits for them
// for ever. A forked child therefore runs on its one thread; results do not depend on their number.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Workers workers() {
  if (forked) return {1, run_on_torch_threads};
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run_on_torch_threads};
}

// Scratch memory from torch's allocator. Large pieces ask for huge pages: packed panels are walked
// in an order that costs a TLB entry per few KiB otherwise.
Tensor workspace(int64_t bytes) {
  Tensor scratch = torch::stable::empty({std::max<int64_t>(bytes, 64)}, ScalarType::Byte);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  uintptr_t begin = reinterpret_cast<uintptr_t>(scratch.const_data_ptr());
  uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  begin = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return scratch;
}

DType dtype_of(const Tensor& t) {
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

// [B, S, H, D], or varlen [T, H, D] as a batch without a batch stride.
TensorRef ref(const Tensor& t, DType dtype) {
  STD_TORCH_CHECK(t.dim() == 3 || t.dim() == 4, "attnforge_native: expected 3 or 4 dimensions");
  STD_TORCH_CHECK(dtype_of(t) == dtype, "attnforge_native: tensors differ in dtype");
  int64_t d = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(d) == 1 || t.size(d) == 1 || t.numel() == 0,
                  "attnforge_native: the last dimension must have stride 1");
  // mutable_data_ptr would trip over read-only inputs; the kernels write through output refs alone.
  void* data = const_cast<void*>(t.const_data_ptr());
  return {data, t.dim() == 4 ? t.stride(0) : 0, t.stride(d - 2), t.stride(d - 1)};
}

TensorRef ref(const OptionalTensor& t, DType dtype) {
  return t ? ref(*t, dtype) : TensorRef{};
}

RowStatRef stat(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.stride(t.dim() - 1) == 1,
                  "attnforge_native: row statistics must be float32 with unit last stride");
  auto* data = static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
  if (t.dim() == 3) return {data, t.stride(0), t.stride(1)};
  return {data, 0, t.stride(0)};
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
};

int64_t window(int64_t size) {
  return std::clamp<int64_t>(size, -1, int64_t{1} << 40);
}

FlashProblem problem(const Tensor& q, const Tensor& k, const Tensor& v,
                     const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                     const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
                     const OptionalTensor& sinks, int64_t max_seqlen_q, int64_t max_seqlen_k,
                     const Scores& scores) {
  FlashProblem p;
  p.dtype = dtype_of(q);
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
                      p.v_head_dim <= 576 && p.head_dim > 0 && p.v_head_dim > 0,
                  "attnforge_native: head dims must be multiples of 8 up to 576");
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

bool empty(const FlashProblem& p) {
  return p.batch <= 0 || p.heads_q == 0;
}

// Varlen rows behind the last sequence belong to nobody; no returned element stays unwritten.
void zero_tail(const Tensor& t, const int32_t* cu_seqlens, int64_t batch) {
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

void fill_tail(const Tensor& t, const int32_t* cu_seqlens, int64_t batch, float value) {
  if (!cu_seqlens) return;
  RowStatRef r = stat(t);
  int64_t first = batch > 0 ? std::clamp<int64_t>(cu_seqlens[batch], 0, t.size(1)) : 0;
  for (int64_t head = 0; head < t.size(0); ++head) {
    std::fill(r.data + head * r.head_stride + first, r.data + head * r.head_stride + t.size(1),
              value);
  }
}

void run_decode(FlashFwdParams& params) {
  Tensor scratch = workspace(kernels().flash_decode_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().flash_decode(params, workers());
}

void flash_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
               const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
               const OptionalTensor& sinks, const Tensor& out, const Tensor& lse,
               const OptionalTensor& out_lo, int64_t max_seqlen_q, int64_t max_seqlen_k,
               double softmax_scale, int64_t window_left, int64_t window_right, double softcap) {
  FlashFwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  zero_tail(out, p.cu_seqlens_q, p.batch);
  if (out_lo) zero_tail(*out_lo, p.cu_seqlens_q, p.batch);
  fill_tail(lse, p.cu_seqlens_q, p.batch, -std::numeric_limits<float>::infinity());
  if (empty(p)) return;
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype), params.out_lo = ref(out_lo, p.dtype);
  params.lse = stat(lse);
  // The route is chosen per sequence, so that a request's result does not depend on its neighbours.
  bool many = p.seqlen_q * (p.heads_q / p.heads_k) > kFewRows;
  if (many) {
    params.route = RowRoute::kManyRows;
    Tensor scratch = workspace(kernels().flash_fwd_workspace(params, workers().num_threads));
    params.workspace = scratch.mutable_data_ptr();
    kernels().flash_fwd(params, workers());
  }
  if (!many || cu_seqlens_q) {
    params.route = RowRoute::kFewRows;
    run_decode(params);
  }
}

void flash_decode(const Tensor& q, const Tensor& k, const Tensor& v,
                  const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
                  const OptionalTensor& sinks, const Tensor& out, const Tensor& lse,
                  double softmax_scale, int64_t window_left, int64_t window_right, double softcap,
                  int64_t num_splits) {
  FlashFwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, std::nullopt, std::nullopt, seqused_k, alibi_slopes, sinks, q.size(1),
              k.size(1), {softmax_scale, window_left, window_right, softcap});
  if (empty(p)) return;
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype);
  params.lse = stat(lse);
  if (num_splits > 0)
    params.split_keys = std::max<int64_t>(1, (p.seqlen_k + num_splits - 1) / num_splits);
  run_decode(params);
}

void flash_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
               const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo,
               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
               const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
               const OptionalTensor& sinks, const Tensor& dq, const Tensor& dk, const Tensor& dv,
               const Tensor& delta, int64_t max_seqlen_q, int64_t max_seqlen_k,
               double softmax_scale, int64_t window_left, int64_t window_right, double softcap) {
  FlashBwdParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  zero_tail(dq, p.cu_seqlens_q, p.batch);
  zero_tail(dk, p.cu_seqlens_k, p.batch);
  zero_tail(dv, p.cu_seqlens_k, p.batch);
  fill_tail(delta, p.cu_seqlens_q, p.batch, 0.0f);
  if (empty(p)) return;
  params.dout = ref(dout, p.dtype);
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype), params.out_lo = ref(out_lo, p.dtype);
  params.dq = ref(dq, p.dtype), params.dk = ref(dk, p.dtype), params.dv = ref(dv, p.dtype);
  params.lse = stat(lse);
  if (dlse) params.dlse = stat(*dlse);
  params.delta = stat(delta);
  Tensor scratch = workspace(kernels().flash_bwd_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().flash_bwd(params, workers());
}

void merge_states(const Tensor& outs, const Tensor& lses, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(
      (outs.dim() == 4 || outs.dim() == 5) && lses.dim() == outs.dim() - 1 &&
          outs.is_contiguous() && lses.is_contiguous() && out.is_contiguous() &&
          lse.is_contiguous() && dtype_of(out) == dtype_of(outs) &&
          lses.scalar_type() == ScalarType::Float,
      "attnforge_native: merge_states wants contiguous [N, B, S, H, D] and [N, B, H, S]");
  MergeParams params;
  bool batched = outs.dim() == 5;
  int64_t s = batched ? 2 : 1;
  params.dtype = dtype_of(outs);
  params.states = outs.size(0);
  params.batch = batched ? outs.size(1) : 1;
  params.seqlen = outs.size(s);
  params.heads = outs.size(s + 1);
  params.dim = outs.size(s + 2);
  STD_TORCH_CHECK(lses.numel() == params.states * params.batch * params.seqlen * params.heads &&
                      out.numel() * params.states == outs.numel() &&
                      lse.numel() * params.states == lses.numel(),
                  "attnforge_native: merge_states got tensors that differ in shape");
  params.outs = outs.const_data_ptr();
  params.lses = static_cast<const float*>(lses.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  kernels().merge_states(params, workers());
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// GB/s of streaming `buffer` once with all threads.
double probe_read(const Tensor& buffer) {
  int64_t bytes = buffer.numel() * buffer.element_size();
  auto start = std::chrono::steady_clock::now();
  kernels().probe_read(workers(), buffer.const_data_ptr(), bytes);
  return static_cast<double>(bytes) / seconds_since(start) * 1e-9;
}

// GFLOP/s of `iterations` register tiles per thread on operands in L1.
double probe_fma(int64_t iterations) {
  auto start = std::chrono::steady_clock::now();
  double flops = kernels().probe_fma(workers(), iterations);
  return flops / seconds_since(start) * 1e-9;
}

std::string cpu_isa(std::string name) {
  if (!name.empty()) {
    STD_TORCH_CHECK(select_isa(name.c_str()), "attnforge: CPU ISA level '", name,
                    "' is unknown or does not run here; levels: auto,", isa_levels());
  }
  return kernels().isa;
}

std::string cpu_isa_levels() {
  return isa_levels();
}

}  // namespace
}  // namespace attnforge::cpu

#define ATTNFORGE_SCORES "float softmax_scale, int window_left, int window_right, float softcap"
#define ATTNFORGE_EXTRAS                                                                          \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? alibi_slopes, Tensor? " \
  "sinks, "
#define ATTNFORGE_LENGTHS "int max_seqlen_q, int max_seqlen_k, "

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def("flash_fwd(Tensor q, Tensor k, Tensor v, " ATTNFORGE_EXTRAS
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? out_lo, " ATTNFORGE_LENGTHS ATTNFORGE_SCORES
        ") -> ()");
  m.def(
      "flash_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? out_lo, " ATTNFORGE_EXTRAS
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) "
      "delta, " ATTNFORGE_LENGTHS ATTNFORGE_SCORES ") -> ()");
  m.def(
      "flash_decode(Tensor q, Tensor k, Tensor v, Tensor? seqused_k, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor(a!) out, Tensor(b!) lse, " ATTNFORGE_SCORES ", int num_splits) -> ()");
  m.def("merge_states(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("probe_read(Tensor buffer) -> float");
  m.def("probe_fma(int iterations) -> float");
  m.def("cpu_isa(str name) -> str");
  m.def("cpu_isa_levels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("flash_fwd", TORCH_BOX(&attnforge::cpu::flash_fwd));
  m.impl("flash_bwd", TORCH_BOX(&attnforge::cpu::flash_bwd));
  m.impl("flash_decode", TORCH_BOX(&attnforge::cpu::flash_decode));
  m.impl("merge_states", TORCH_BOX(&attnforge::cpu::merge_states));
  m.impl("probe_read", TORCH_BOX(&attnforge::cpu::probe_read));
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CompositeExplicitAutograd, m) {
  m.impl("probe_fma", TORCH_BOX(&attnforge::cpu::probe_fma));
  m.impl("cpu_isa", TORCH_BOX(&attnforge::cpu::cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&attnforge::cpu::cpu_isa_levels));
}
