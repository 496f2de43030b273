//! The GPU ways of [`linear`](super::linear()).

use kernels_ptx::kernels::column_sums::ColumnSums;
use kernels_ptx::kernels::few_rows_product::FewRowsProduct;
use kernels_ptx::kernels::matrix_product::{MatrixProduct, Tile};
use kernels_ptx::kernels::matrix_product_f32::MatrixProductF32;
use runtime::Argument;

use super::{OPERATOR, Ways, output_shape};
use crate::gpu::{self, Output};
use crate::ops::add_in_place;
use crate::{DType, Result, Tensor};

pub(super) const WAYS: Ways = Ways { forward, input_gradient, weight_gradient, add_weight_gradient, bias_gradient };

/// Blocks that products are split into where they have too few of their own: two per multiprocessor of an H100. The same on
/// every device, since the split decides in which order sums are formed.
const BLOCKS: u32 = 264;

/// One operand: a matrix as it is stored, and whether the product wants it transposed.
#[derive(Clone, Copy)]
struct Operand<'a> {
    tensor: &'a Tensor,
    /// The innermost dimension.
    width: usize,
    transposed: bool,
}

fn forward(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
    let (rows, inner, outer) = (input.rows(), input.last_dimension(), weight.shape()[0]);
    let weight = weight.cast(input.dtype())?;
    let bias = bias.map(|bias| bias.cast(DType::F32)).transpose()?;
    let residual = residual.map(|residual| residual.cast(input.dtype())).transpose()?;
    let a = Operand { tensor: input, width: inner, transposed: false };
    let b = Operand { tensor: &weight, width: inner, transposed: false };
    let shape = output_shape(input, &weight);
    if let Some(product) = few_rows(input, &weight, bias.as_ref(), residual.as_ref(), &shape)? {
        return Ok(product);
    }
    product(a, b, [rows, outer, inner], (bias.as_ref(), residual.as_ref()), &shape, input.dtype())
}

/// The way for the few rows of a decoding step; `None` where it does not suit.
fn few_rows(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    shape: &[usize],
) -> Result<Option<Tensor>> {
    let Some(kernel) = few_rows_kernel(input, weight)? else { return Ok(None) };
    let kernel = FewRowsProduct { bias: bias.is_some(), residual: residual.is_some(), ..kernel };
    let added: Vec<&Tensor> = bias.into_iter().chain(residual).collect();
    launch_few_rows(kernel, input, weight, &added, shape).map(Some)
}

/// `silu(x Gᵀ) · (x Uᵀ)` in one launch; `None` where it does not suit.
pub(super) fn gated(input: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    let same = gate.shape() == up.shape() && gate.dtype() == DType::Bf16 && up.dtype() == DType::Bf16;
    let kernel = few_rows_kernel(input, gate)?.filter(|kernel| same && kernel.tiles == 1);
    let Some(kernel) = kernel else { return Ok(None) };
    let kernel = FewRowsProduct { gated: true, ..kernel };
    launch_few_rows(kernel, input, gate, &[up], &output_shape(input, gate)).map(Some)
}

/// The kernel for so many rows, plain; `None` for too many and for depths that it does not take.
fn few_rows_kernel(input: &Tensor, weight: &Tensor) -> Result<Option<FewRowsProduct>> {
    if input.dtype() != DType::Bf16 || !weight.shape()[1].is_multiple_of(8) {
        return Ok(None);
    }
    let rows = gpu::size(OPERATOR, "rows", input.rows())?;
    let output = gpu::element(DType::Bf16);
    Ok(FewRowsProduct::best(rows).filter(|_| rows > 0).map(|(room, tiles)| FewRowsProduct {
        output,
        bias: false,
        residual: false,
        room,
        tiles,
        gated: false,
    }))
}

/// `others` are what the kernel takes after the weight, in its order.
fn launch_few_rows(
    kernel: FewRowsProduct,
    input: &Tensor,
    weight: &Tensor,
    others: &[&Tensor],
    shape: &[usize],
) -> Result<Tensor> {
    let dimensions = [input.rows(), weight.shape()[0], weight.shape()[1]];
    let [rows, outer, depth] = dimensions;
    let [rows, outer, depth] = [
        gpu::size(OPERATOR, "rows", rows)?,
        gpu::size(OPERATOR, "columns", outer)?,
        gpu::size(OPERATOR, "the depth", depth)?,
    ];
    let mut output = Output::new(input.device(), shape, DType::Bf16)?;
    let mut arguments = vec![output.write(), gpu::read(input), gpu::read(weight)];
    arguments.extend(others.iter().map(|other| gpu::read(other)));
    arguments.extend([rows, outer, depth].map(Argument::U32));
    let sizes = dimensions.map(|size| size as u64);
    gpu::launch(OPERATOR, input.device(), &kernel, kernel.grid(outer), &sizes, &arguments)?;
    drop(arguments);
    Ok(output.tensor())
}

fn input_gradient(gradient: &Tensor, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, inner, outer) = (input.rows(), input.last_dimension(), weight.shape()[0]);
    let (gradient, weight) = (gradient.cast(input.dtype())?, weight.cast(input.dtype())?);
    let a = Operand { tensor: &gradient, width: outer, transposed: false };
    let b = Operand { tensor: &weight, width: inner, transposed: true };
    product(a, b, [rows, inner, outer], (None, None), input.shape(), input.dtype())
}

fn weight_gradient(gradient: &Tensor, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, inner, outer) = (input.rows(), input.last_dimension(), weight.shape()[0]);
    let gradient = gradient.cast(input.dtype())?;
    let a = Operand { tensor: &gradient, width: outer, transposed: true };
    let b = Operand { tensor: input, width: inner, transposed: true };
    product(a, b, [outer, inner, rows], (None, None), weight.shape(), DType::F32)
}

fn add_weight_gradient(mut sum: Tensor, gradient: &Tensor, input: &Tensor) -> Result<Tensor> {
    let (rows, inner, outer) = (input.rows(), input.last_dimension(), gradient.last_dimension());
    let gradient = gradient.cast(input.dtype())?;
    let a = Operand { tensor: &gradient, width: outer, transposed: true };
    let b = Operand { tensor: input, width: inner, transposed: true };
    let size = |what, size| gpu::size(OPERATOR, what, size);
    let (m, n, k) = (size("rows", outer)?, size("columns", inner)?, size("the depth", rows)?);
    let kernel = MatrixProduct { accumulate: true, ..on_tensor_cores(a, b, m, n, DType::F32) };
    let (splits, split_depth) = kernel.splits(m, n, k, BLOCKS);
    if input.dtype() == DType::F32 || splits > 1 {
        let addend = product(a, b, [outer, inner, rows], (None, None), sum.shape(), DType::F32)?;
        add_in_place(&mut sum, &addend)?;
        return Ok(sum);
    }
    let mut arguments = vec![Argument::Write(sum.make_unique()?, gpu::element(DType::F32))];
    arguments.extend([gpu::read(a.tensor), gpu::read(b.tensor)]);
    arguments.extend([m, n, k, split_depth].map(Argument::U32));
    let sizes = [m.into(), n.into(), k.into()];
    gpu::launch(OPERATOR, input.device(), &kernel, kernel.grid(m, n, 1), &sizes, &arguments)?;
    drop(arguments);
    Ok(sum)
}

/// The kernel for operands of bf16, without bias and residual.
fn on_tensor_cores(a: Operand<'_>, b: Operand<'_>, m: u32, n: u32, output: DType) -> MatrixProduct {
    let aligned = a.width.is_multiple_of(8) && b.width.is_multiple_of(8) && n.is_multiple_of(2);
    let large = aligned && m >= 128 && n >= 128;
    MatrixProduct {
        a_transposed: a.transposed,
        b_transposed: b.transposed,
        output: gpu::element(output),
        bias: false,
        residual: false,
        accumulate: false,
        aligned,
        tile: if large { Tile::Large } else { Tile::Small },
    }
}

/// `A Bᵀ` for A `[m, k]`, B `[n, k]` (or stored transposed), in the element type of A and B.
fn product(
    a: Operand<'_>,
    b: Operand<'_>,
    [m, n, k]: [usize; 3],
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    shape: &[usize],
    output: DType,
) -> Result<Tensor> {
    let device = a.tensor.device();
    let sizes = [m as u64, n as u64, k as u64];
    let (m, n) = (gpu::size(OPERATOR, "rows", m)?, gpu::size(OPERATOR, "columns", n)?);
    let k = gpu::size(OPERATOR, "the depth", k)?;
    let in_f32 = a.tensor.dtype() == DType::F32;
    let narrow =
        MatrixProduct { bias: bias.is_some(), residual: residual.is_some(), ..on_tensor_cores(a, b, m, n, output) };
    let (splits, split_depth) = match (output, bias.or(residual)) {
        (DType::F32, None) if in_f32 => MatrixProductF32::splits(m, n, k, BLOCKS),
        (DType::F32, None) => narrow.splits(m, n, k, BLOCKS),
        _ => (1, k.max(1).next_multiple_of(64)),
    };
    let mut target = match splits {
        1 => Output::new(device, shape, output)?,
        _ => Output::new(device, &[splits as usize, m as usize, n as usize], DType::F32)?,
    };
    let mut arguments = vec![target.write(), gpu::read(a.tensor), gpu::read(b.tensor)];
    arguments.extend(bias.map(gpu::read));
    arguments.extend(residual.map(gpu::read));
    arguments.extend([m, n, k, split_depth].map(Argument::U32));
    if in_f32 {
        for operand in [a, b] {
            let width = gpu::size(OPERATOR, "the width", operand.width)?;
            let (row, depth) = if operand.transposed { (1, width) } else { (width, 1) };
            arguments.extend([Argument::U32(row), Argument::U32(depth)]);
        }
        let kernel = MatrixProductF32 { bias: bias.is_some(), residual: residual.is_some() };
        gpu::launch(OPERATOR, device, &kernel, MatrixProductF32::grid(m, n, splits), &sizes, &arguments)?;
    } else {
        gpu::launch(OPERATOR, device, &narrow, narrow.grid(m, n, splits), &sizes, &arguments)?;
    }
    drop(arguments);
    match splits {
        1 => Ok(target.tensor()),
        _ => gpu::sum_parts(OPERATOR, &target.tensor(), splits, shape),
    }
}

fn bias_gradient(gradient: &Tensor) -> Result<Tensor> {
    let (rows, columns) = (gradient.rows(), gradient.last_dimension());
    let device = gradient.device();
    let (row_count, column_count) = (gpu::size(OPERATOR, "rows", rows)?, gpu::size(OPERATOR, "columns", columns)?);
    let (splits, part_rows) = ColumnSums::parts(row_count);
    let mut parts = Output::new(device, &[splits as usize, columns], DType::F32)?;
    let arguments = [
        parts.write(),
        gpu::read(gradient),
        Argument::U32(row_count),
        Argument::U32(column_count),
        Argument::U32(part_rows),
    ];
    let kernel = ColumnSums { element: gpu::element(gradient.dtype()), matrices: 1 };
    let sizes = [rows as u64, columns as u64];
    gpu::launch(OPERATOR, device, &kernel, ColumnSums::grid(&[column_count], splits), &sizes, &arguments)?;
    gpu::sum_parts(OPERATOR, &parts.tensor(), splits, &[columns])
}
