// The table of kernel ids. Python's specs are checked against it.
#pragma once

#include <string>
#include <vector>

#include "cuda/block_sparse/tiles.h"
#include "cuda/flash/sm90/bwd_tiles.h"
#include "cuda/flash/sm90/decode_tiles.h"
#include "cuda/flash/sm90/fp8_tiles.h"
#include "cuda/flash/tiles.h"
#include "cuda/linear/tiles.h"
#include "cuda/paged/tiles.h"
#include "cuda/retrieval/tiles.h"

namespace attnforge::cuda {

// Every kernel that is instantiated, by the functions that the launchers take their tiles from.
struct KernelRow {
  std::string kernel;
  DType dtype;
  HeadDims dims;
  bool features;

  // For example fwd.bf16.d192x128.features
  std::string id() const {
    const char* names[] = {"fp32", "fp16", "bf16", "fp8"};
    return kernel + "." + names[static_cast<int>(dtype)] + ".d" + std::to_string(dims.qk) + "x" +
           std::to_string(dims.v) + (features ? ".features" : "");
  }
};

inline std::vector<KernelRow> kernel_table() {
  std::vector<KernelRow> rows;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (HeadDims dims : kHeadDims) {
      for (bool features : {false, true}) rows.push_back({"fwd", dtype, dims, features});
      rows.push_back({"decode", dtype, dims, true});
      for (bool features : {false, true}) {
        if (keys_and_values_apart(dtype, dims)) {
          rows.push_back({"dk", dtype, dims, features});
          rows.push_back({"dv", dtype, dims, features});
        } else {
          rows.push_back({"dkdv", dtype, dims, features});
        }
        rows.push_back({"dq", dtype, dims, features});
      }
    }
    for (HeadDims dims : kListedDims) {
      const bool apart = keys_and_values_apart(dtype, dims);
      rows.push_back({"indexed_fwd", dtype, dims, false});
      for (const char* kernel : {"listed_fwd_few", "listed_fwd", "listed_dq_few", "listed_dq",
                                 apart ? "listed_dk" : "listed_dkdv"}) {
        rows.push_back({kernel, dtype, dims, false});
      }
      if (apart) rows.push_back({"listed_dv", dtype, dims, false});
    }
    for (HeadDims dims : kIndexedBwdDims) {
      const bool apart = keys_and_values_apart(dtype, dims);
      rows.push_back({"indexed_dq", dtype, dims, false});
      rows.push_back({apart ? "indexed_dk" : "indexed_dkdv", dtype, dims, false});
      if (apart) rows.push_back({"indexed_dv", dtype, dims, false});
    }
    for (int dim : kScoreDims) rows.push_back({"key_scores", dtype, {dim, dim}, false});
    for (const char* codes : {"", "_codes"}) {
      for (HeadDims dims : kPagedDims) {
        for (const char* kernel : {"paged_prefill", "paged_decode"}) {
          rows.push_back({std::string(kernel) + codes, dtype, dims, false});
        }
      }
      if (dtype != DType::kFloat32) {
        rows.push_back({std::string("paged_latent") + codes, dtype, kLatentDims, false});
      }
    }
  }
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int dim : kWalkDims) {
      for (const char* gate : {"whole", "read", "columns"}) {
        rows.push_back({std::string("linear_") + gate, dtype, {dim, kWalkColumns}, false});
      }
      for (const char* walk : {"whole", "read", "whole_reverse", "read_reverse"}) {
        rows.push_back({std::string("linear_delta_") + walk, dtype, {dim, kWalkColumns}, false});
      }
      if (dtype == DType::kFloat32) continue;
      for (const char* gate : {"whole", "columns"}) {
        rows.push_back({std::string("linear_wide_") + gate, dtype, {dim, kWalkColumns}, false});
      }
    }
  }
#if defined(ATTNFORGE_SM90A)
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (HeadDims dims : kHeadDims) {
      for (bool features : {false, true}) rows.push_back({"fwd_sm90", dtype, dims, features});
    }
    for (int index : kSm90BwdDims) {
      for (bool features : {false, true}) {
        rows.push_back({"dkdv_sm90", dtype, kHeadDims[index], features});
        rows.push_back({"dq_sm90", dtype, kHeadDims[index], features});
      }
    }
    for (HeadDims dims : kSm90DecodeDims) rows.push_back({"decode_sm90", dtype, dims, true});
    rows.push_back({"latent_sm90", dtype, kSm90DecodeDims[kNumSm90DecodeDims - 1], true});
  }
  for (HeadDims dims : kSm90Fp8Dims) rows.push_back({"fwd_sm90", DType::kFloat8, dims, true});
#endif
  return rows;
}

}  // namespace attnforge::cuda
