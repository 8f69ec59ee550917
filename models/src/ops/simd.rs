//! Loops over slices that the compiler vectorises, compiled for each instruction set and chosen at run time by `pulp`
//! (AVX-512, AVX2 or NEON, else whatever the target has).

/// A function whose body is compiled for each instruction set, and which runs the best that this machine has. What it
/// calls must be `#[inline(always)]` all the way, or is compiled for the plainest. (A closure would not do: nothing makes
/// it part of the function that has the instructions.)
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block) => {
        vectorised! { $(#[$meta])* $vis fn $name($($arg: $type),*) -> () $body }
    };
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $output:ty $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $type),*) -> $output {
            struct Arguments<T>(T);
            impl pulp::NullaryFnOnce for Arguments<($($type,)*)> {
                type Output = $output;
                #[inline(always)]
                fn call(self) -> $output {
                    let Arguments(($($arg,)*)) = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Arguments(($($arg,)*)))
        }
    };
}
pub(crate) use vectorised;

const LANES: usize = 16;

/// Σ f(i, x_i) in sixteen running sums: fixed order, so that the result does not depend on the instruction set's width.
#[inline(always)]
pub fn sum_by(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f(v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += f(v);
    }
    lanes.iter().sum()
}

vectorised! {
    /// Σ x_i in that order.
    pub fn sum(x: &[f32]) -> f32 {
        sum_by(x, |v| v)
    }
}

/// Σ x_i·y_i in the same order.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (x_rest, y_rest) = (xs.remainder(), ys.remainder());
    for (xs, ys) in xs.zip(ys) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(xs).zip(ys) {
            *lane += a * b;
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        *lane += a * b;
    }
    lanes.iter().sum()
}

/// The largest value; −∞ of none. NaN is passed over.
#[inline(always)]
pub fn max_of(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = lane.max(v);
    }
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(v);
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// eˣ to 2 units in the last place, without branches: range reduction by powers of two, then a polynomial of degree 6.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // The nearest integer sits in the low bits after this addition.
    const SHIFTER: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + SHIFTER;
    let n = shifted - SHIFTER;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.388_888_9e-3;
    for c in [8.333_333e-3, 4.166_666_6e-2, 1.666_666_7e-1, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let exponent = (shifted.to_bits() as i32).wrapping_sub(SHIFTER.to_bits() as i32);
    p * f32::from_bits((exponent.wrapping_add(127) << 23) as u32)
}

/// 1/(1 + e^−x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_matches_libm_over_its_range() {
        for i in -8600..8700 {
            let x = i as f32 * 0.01;
            let exact = libm::exp(f64::from(x));
            assert!(((f64::from(exp(x)) - exact) / exact).abs() < 3e-7, "exp({x})");
        }
    }

    #[test]
    fn sums_match_f64() {
        let x: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin()).collect();
        let exact: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        assert!((f64::from(dot(&x, &x)) - exact).abs() < 1e-3);
        assert!((f64::from(sum_by(&x, |v| v * v)) - exact).abs() < 1e-3);
    }
}
