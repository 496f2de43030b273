//! How far results are from what was expected.
//!
//! Two measures are formed, both relative to what was expected and absolute where that is zero everywhere: the Euclidean
//! norm of the difference over that of the expected values, and the greatest difference over the greatest magnitude.
//! Every decision is written `error <= bound`, which is false for NaN.

use anyhow::{Result, bail};

/// How far from the expected values a result may be; a bound that is `None` is not checked.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    /// Greatest `‖a − b‖ / ‖b‖`.
    pub relative_l2: Option<f64>,
    /// Greatest `max|a − b| / max|b|`.
    pub relative_max: Option<f64>,
}

impl Bounds {
    /// Both bounds.
    pub fn new(relative_l2: f64, relative_max: f64) -> Self {
        Self { relative_l2: Some(relative_l2), relative_max: Some(relative_max) }
    }

    /// Every element equal: for integers and for values that are copied.
    pub fn exact() -> Self {
        Self { relative_l2: Some(0.0), relative_max: Some(0.0) }
    }

    /// Both bounds times `factor`.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        Self {
            relative_l2: self.relative_l2.map(|bound| bound * factor),
            relative_max: self.relative_max.map(|bound| bound * factor),
        }
    }
}

/// The measures of one result.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Number of elements compared.
    pub count: usize,
    /// Root mean square of the difference.
    pub rms_absolute: f64,
    /// Greatest magnitude of the difference; NaN if any difference is.
    pub max_absolute: f64,
    /// `‖a − b‖ / ‖b‖`; `‖a − b‖` where everything expected is zero.
    pub relative_l2: f64,
    /// `max|a − b| / max|b|`; `max|a − b|` where everything expected is zero.
    pub relative_max: f64,
    /// The element that differs most; the first NaN if there is one. `None`: all are equal.
    pub worst: Option<Worst>,
}

/// One element.
#[derive(Clone, Debug, PartialEq)]
pub struct Worst {
    /// Its coordinates.
    pub index: Vec<usize>,
    /// What was computed.
    pub got: f64,
    /// What was expected.
    pub expected: f64,
}

impl Comparison {
    /// Whether both measures are within their bounds. Never where a difference is NaN or there is no bound at all.
    pub fn within(&self, bounds: Bounds) -> bool {
        let holds = |error: f64, bound: Option<f64>| bound.is_none_or(|bound| error <= bound);
        bounds != Bounds::default()
            && !self.max_absolute.is_nan()
            && holds(self.relative_l2, bounds.relative_l2)
            && holds(self.relative_max, bounds.relative_max)
    }

    /// The greater measure as a fraction of its bound: 0 where all is equal, infinite where a difference is NaN.
    pub fn fraction_of(&self, bounds: Bounds) -> f64 {
        if self.max_absolute == 0.0 {
            return 0.0;
        }
        let fraction = |error: f64, bound: Option<f64>| bound.map_or(0.0, |bound| error / bound);
        let (l2, max) =
            (fraction(self.relative_l2, bounds.relative_l2), fraction(self.relative_max, bounds.relative_max));
        if l2.is_nan() || max.is_nan() { f64::INFINITY } else { l2.max(max) }
    }
}

/// Compares a result with what was expected, each given as shape and row-major values.
///
/// # Errors
/// Shapes that differ; values that are not as many as their shape says.
pub fn compare(got: (&[usize], &[f64]), expected: (&[usize], &[f64])) -> Result<Comparison> {
    let ((got_shape, got), (shape, expected)) = (got, expected);
    if got_shape != shape {
        bail!("shape {got_shape:?}, expected {shape:?}");
    }
    let count = shape.iter().product::<usize>();
    if got.len() != count || expected.len() != count {
        bail!("{} values and {} expected for shape {shape:?}", got.len(), expected.len());
    }
    let (mut squares, mut expected_squares) = (0.0f64, 0.0f64);
    let (mut greatest, mut expected_greatest) = (0.0f64, 0.0f64);
    let mut worst = None;
    for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        // An infinity that was expected is right, and says nothing about the size of the others.
        if got == expected && got.is_infinite() {
            continue;
        }
        let difference = if got == expected { 0.0 } else { (got - expected).abs() };
        squares += difference * difference;
        expected_squares += expected * expected;
        expected_greatest = expected_greatest.max(expected.abs());
        // A NaN, once met, stays.
        if !greatest.is_nan() && (difference > greatest || difference.is_nan()) {
            greatest = difference;
            worst = Some(Worst { index: coordinates(index, shape), got, expected });
        }
    }
    let relative = |error: f64, size: f64| if size == 0.0 { error } else { error / size };
    Ok(Comparison {
        count,
        rms_absolute: (squares / count.max(1) as f64).sqrt(),
        max_absolute: greatest,
        relative_l2: relative(squares.sqrt(), expected_squares.sqrt()),
        relative_max: relative(greatest, expected_greatest),
        worst,
    })
}

/// The coordinates of an element.
fn coordinates(index: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = index;
    let mut coordinates = vec![0; shape.len()];
    for (coordinate, &size) in coordinates.iter_mut().zip(shape).rev() {
        *coordinate = rest % size;
        rest /= size;
    }
    coordinates
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIGHT: Bounds = Bounds { relative_l2: Some(1e-6), relative_max: Some(2e-6) };
    const WIDE: Bounds = Bounds { relative_l2: Some(1e30), relative_max: Some(1e30) };

    fn against(expected: &[f64], got: &[f64]) -> Comparison {
        compare((&[got.len()], got), (&[expected.len()], expected)).unwrap()
    }

    #[test]
    fn equal_results_pass_and_a_small_error_is_measured() {
        let same = against(&[1.0, -2.0], &[1.0, -2.0]);
        assert!(same.within(Bounds::exact()) && same.fraction_of(Bounds::exact()) == 0.0 && same.worst.is_none());
        let close = against(&[3.0, -4.0], &[3.0, -4.000_004]);
        assert!((close.relative_l2 - 0.8e-6).abs() < 1e-12 && (close.relative_max - 1e-6).abs() < 1e-12);
        assert!((close.rms_absolute - 4e-6 / 2f64.sqrt()).abs() < 1e-12);
        assert!(close.within(TIGHT) && !close.within(Bounds::exact()));
        assert!((close.fraction_of(TIGHT) - 0.8).abs() < 1e-6);
        assert_eq!(close.worst.as_ref().unwrap().index, [1]);
        assert!(!against(&[3.0, -4.0], &[3.0, -4.000_01]).within(TIGHT));
        assert!(!close.within(Bounds::default()), "no bound at all");
    }

    #[test]
    fn each_measure_fails_on_its_own() {
        let expected = vec![1.0; 1000];
        let mut spike = expected.clone();
        spike[17] += 1e-5;
        let comparison = against(&expected, &spike);
        assert!(comparison.relative_l2 <= 1e-6 && !comparison.within(TIGHT), "{comparison:?}");
        let shift: Vec<f64> = expected.iter().map(|value| value + 1.5e-6).collect();
        let comparison = against(&expected, &shift);
        assert!(comparison.relative_max <= 2e-6 && !comparison.within(TIGHT), "{comparison:?}");
    }

    #[test]
    fn not_a_number_fails_wherever_it_is_and_however_wide_the_bounds() {
        let good = [1.0, 2.0, 3.0];
        for place in 0..3 {
            let mut bad = good;
            bad[place] = f64::NAN;
            for (expected, got) in [(good, bad), (bad, good), (bad, bad)] {
                let comparison = against(&expected, &got);
                assert!(!comparison.within(WIDE) && !comparison.within(Bounds::exact()), "{comparison:?}");
                assert_eq!(comparison.fraction_of(WIDE), f64::INFINITY);
                assert_eq!(comparison.worst.as_ref().unwrap().index, [place]);
            }
        }
    }

    #[test]
    fn infinities_fail_unless_they_are_expected() {
        assert!(!against(&[1.0, 2.0], &[1.0, f64::INFINITY]).within(WIDE));
        assert!(!against(&[1.0, f64::INFINITY], &[1.0, f64::NEG_INFINITY]).within(WIDE));
        assert!(!against(&[1.0, f64::INFINITY], &[1.0, 2.0]).within(WIDE));
        assert!(against(&[1.0, f64::INFINITY], &[1.0, f64::INFINITY]).within(TIGHT));
        assert!(!against(&[1.0, f64::INFINITY], &[1.1, f64::INFINITY]).within(TIGHT), "an infinity hides nothing");
    }

    #[test]
    fn a_sign_or_a_shift_fails() {
        let expected: Vec<f64> = (0..50).map(|index| f64::from(index).sin()).collect();
        let negated: Vec<f64> = expected.iter().map(|value| -value).collect();
        let mut shifted = expected.clone();
        shifted.rotate_left(1);
        assert!(!against(&expected, &negated).within(TIGHT));
        assert!(!against(&expected, &shifted).within(TIGHT));
    }

    #[test]
    fn another_length_or_shape_is_an_error() {
        assert!(compare((&[1], &[1.0]), (&[2], &[1.0, 2.0])).is_err());
        assert!(compare((&[2], &[1.0]), (&[2], &[1.0, 2.0])).is_err());
        let error = compare((&[2, 1], &[1.0, 2.0]), (&[1, 2], &[1.0, 2.0])).unwrap_err();
        assert_eq!(error.to_string(), "shape [2, 1], expected [1, 2]");
    }

    #[test]
    fn expected_zeros_bound_the_absolute_error() {
        assert!(against(&[0.0, 0.0], &[5e-7, 0.0]).within(TIGHT));
        assert!(!against(&[0.0, 0.0], &[5e-6, 0.0]).within(TIGHT));
        assert!(!against(&[0.0, 0.0], &[f64::NAN, 0.0]).within(TIGHT));
    }

    #[test]
    fn coordinates_are_row_major() {
        assert_eq!(coordinates(17, &[2, 3, 4]), [1, 1, 1]);
        assert!(coordinates(0, &[]).is_empty());
    }
}
