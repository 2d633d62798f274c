// float32 calls of the LSTM on a matrix unit.
#pragma once

#include "lstm/cpu/kernels.h"

namespace throughtime {

// Whether a layer is large enough for the matrix unit: where the cell takes as long as the products, or
// packing does, vectors are faster. B is not asked: a sample's bits do not depend on its batch.
bool fits_matrix_unit(const LstmShape& shape);

// A call on the split kernels with that many parts. Samples with numbers that these do not take (2^31
// and beyond, infinities, NaN) have vector kernels of their own; weights of 2^16 and beyond send the
// whole call there.
void run_split(const LstmSplitKernels& split, const LstmKernels& vectors, int parts,
               const LstmForward<float>& pass, const Runtime& runtime);
void run_split(const LstmSplitKernels& split, const LstmKernels& vectors, int parts,
               const LstmBackward<float>& pass, const Runtime& runtime);

}  // namespace throughtime
