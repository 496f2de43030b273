//! Matrix products on the CPU: a safe face for the `gemm` crate.

/// A matrix of f32 in host memory: element (row, column) is at `row * row_stride + column * column_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A contiguous row-major matrix.
    ///
    /// # Panics
    /// When `values` is too short: the caller's shapes are wrong.
    pub fn row_major(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Rows of `columns` elements that begin `row_stride` elements apart.
    ///
    /// # Panics
    /// When `values` is too short: the caller's shapes are wrong.
    pub fn strided(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert_fits(values.len(), rows, columns, row_stride);
        Self { values, rows, columns, row_stride, column_stride: 1 }
    }

    /// The same values with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix of f32 in host memory that a product is written to: rows of contiguous elements.
pub struct MatrixMut<'a> {
    values: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// A contiguous row-major matrix.
    ///
    /// # Panics
    /// When `values` is too short: the caller's shapes are wrong.
    pub fn row_major(values: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Rows of `columns` elements that begin `row_stride` elements apart.
    ///
    /// # Panics
    /// When `values` is too short: the caller's shapes are wrong.
    pub fn strided(values: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert_fits(values.len(), rows, columns, row_stride);
        assert!(rows <= 1 || columns <= row_stride, "rows of {columns} elements overlap at a stride of {row_stride}");
        Self { values, rows, columns, row_stride }
    }
}

/// Whether a product may use all threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// This thread alone: for callers that are parallel themselves.
    One,
    /// Every thread of the current pool.
    All,
}

/// `destination = keep · destination + scale · left × right`. With `keep` zero the destination is not read.
///
/// Deterministic: threads share out rows and columns, never the inner dimension.
///
/// # Panics
/// When the dimensions do not agree: the caller's shapes are wrong.
pub fn multiply(
    destination: MatrixMut<'_>,
    keep: f32,
    left: Matrix<'_>,
    right: Matrix<'_>,
    scale: f32,
    threads: Threads,
) {
    assert_eq!(left.columns, right.rows, "inner dimensions of a matrix product");
    assert_eq!((destination.rows, destination.columns), (left.rows, right.columns), "dimensions of a matrix product");
    if destination.rows == 0 || destination.columns == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the three constructors checked that every element (row, column) within the stated dimensions and strides
    // lies inside its slice, and the asserts above that the dimensions agree, so all accesses are in bounds.
    // `destination` is an exclusive borrow, so it overlaps neither operand, and its rows do not overlap each other.
    // All strides are below isize::MAX because the slices they index exist. All values are initialised f32.
    unsafe {
        gemm::gemm(
            destination.rows,
            destination.columns,
            left.columns,
            destination.values.as_mut_ptr(),
            1,
            destination.row_stride as isize,
            keep != 0.0,
            left.values.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.values.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn assert_fits(length: usize, rows: usize, columns: usize, row_stride: usize) {
    if rows == 0 || columns == 0 {
        return;
    }
    let needed = (rows - 1).checked_mul(row_stride).and_then(|start| start.checked_add(columns));
    assert!(
        needed.is_some_and(|needed| needed <= length),
        "a {rows}×{columns} matrix with row stride {row_stride} does not fit {length} elements"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_adds_to_what_is_kept_and_takes_transposed_operands() {
        // left (2×3) times the transpose of a 2×3 matrix.
        let left = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let right = [1.0, 0.0, 1.0, 0.0, 2.0, 0.0];
        let mut destination = [10.0, 20.0, -1.0, 30.0, 40.0];
        multiply(
            MatrixMut::strided(&mut destination, 2, 2, 3),
            0.5,
            Matrix::row_major(&left, 2, 3),
            Matrix::row_major(&right, 2, 3).transposed(),
            2.0,
            Threads::One,
        );
        assert_eq!(destination, [5.0 + 8.0, 10.0 + 8.0, -1.0, 15.0 + 20.0, 20.0 + 20.0]);
    }

    #[test]
    fn without_keep_the_destination_is_not_read() {
        let mut destination = [f32::NAN; 1];
        let one = [2.0];
        multiply(
            MatrixMut::row_major(&mut destination, 1, 1),
            0.0,
            Matrix::row_major(&one, 1, 1),
            Matrix::row_major(&one, 1, 1),
            1.0,
            Threads::All,
        );
        assert_eq!(destination, [4.0]);
    }

    #[test]
    fn an_empty_inner_dimension_gives_zeros() {
        let mut destination = [f32::NAN; 4];
        multiply(
            MatrixMut::row_major(&mut destination, 2, 2),
            0.0,
            Matrix::row_major(&[], 2, 0),
            Matrix::row_major(&[], 0, 2),
            1.0,
            Threads::One,
        );
        assert_eq!(destination, [0.0; 4]);
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_matrix_longer_than_its_slice_is_refused() {
        Matrix::row_major(&[0.0; 5], 2, 3);
    }
}
