//! The shape rule of every operation, told once: what it takes, and the shape of what it gives. Interpreters that have no
//! tensors (cost, the exporter's graph) infer by these, and the others' results are held against them by the tests.

use crate::ops::Mask;

/// The shape of a result, or why there is none.
pub type Rule = Result<Vec<usize>, String>;

/// Convolution of x `(B, C, H, W)` by a kernel `(O, C, kh, kw)`, or `(O, C)` for 1×1; `pads`: zeros above, left, below,
/// right.
pub fn conv2d(x: &[usize], kernel: &[usize], stride: usize, pads: [usize; 4]) -> Rule {
    let (output, input, kh, kw) = match *kernel {
        [output, input] => (output, input, 1, 1),
        [output, input, kh, kw] => (output, input, kh, kw),
        _ => return Err(format!("the weight has shape {kernel:?}, expected rank 4")),
    };
    let refuse = || Err(format!("weight {kernel:?} with stride {stride} does not fit {x:?}"));
    let &[b, c, h, w] = x else { return refuse() };
    let (h, w) = (h + pads[0] + pads[2], w + pads[1] + pads[3]);
    if input != c || kh > h || kw > w || stride == 0 {
        return refuse();
    }
    Ok(vec![b, output, (h - kh) / stride + 1, (w - kw) / stride + 1])
}

/// Transposed convolution of x `(B, C, H, W)` by a kernel `(C, O, kh, kw)`; `pads` are cut off above, left, below, right.
pub fn conv_transpose2d(x: &[usize], kernel: &[usize], stride: usize, pads: [usize; 4]) -> Rule {
    let side = |n: usize, kernel: usize, cut: usize| (n.checked_sub(1)? * stride + kernel).checked_sub(cut);
    let found = match (x, kernel) {
        (&[b, c, h, w], &[input, output, kh, kw]) if input == c && kh > 0 && kw > 0 && stride > 0 => {
            let sides = side(h, kh, pads[0] + pads[2]).zip(side(w, kw, pads[1] + pads[3]));
            sides.map(|(h, w)| vec![b, output, h, w])
        }
        _ => None,
    };
    found.ok_or_else(|| format!("weight {kernel:?} with pads {pads:?} does not fit {x:?}"))
}

/// Affine map of x `(B, C)` by a weight `(O, C)`.
pub fn linear(x: &[usize], weight: &[usize]) -> Rule {
    match (x, weight) {
        (&[b, c], &[output, input]) if c == input => Ok(vec![b, output]),
        _ => Err(format!("weight {weight:?} does not fit {x:?}")),
    }
}

/// Group norm of x `(B, C, H, W)`.
pub fn group_norm(x: &[usize], groups: usize) -> Rule {
    match x {
        [_, c, _, _] if groups > 0 && c.is_multiple_of(groups) => Ok(x.to_vec()),
        _ => Err(format!("norm of {groups} groups does not take {x:?}")),
    }
}

/// Norm of x `(B, C, H, W)` over runs of `width` channels of each pixel.
pub fn norm(x: &[usize], width: usize) -> Rule {
    match x {
        &[_, c, h, w] if width > 0 && c > 0 && c.is_multiple_of(width) && h * w > 0 => Ok(x.to_vec()),
        _ => Err(format!("a norm over runs of {width} channels does not take {x:?}")),
    }
}

/// Layer norm of x `(B, C, H, W)` with so many scales.
pub fn layer_norm(x: &[usize], channels: usize) -> Rule {
    match norm(x, channels) {
        Ok(_) if x[1] != channels => Err(format!("a norm of {channels} channels does not take {x:?}")),
        found => found,
    }
}

/// Rows of a table `(entries, width)`: vectors for ids `(B,)`, for `(B, N)` a map with a pixel for each token.
pub fn embedding(ids: &[usize], table: &[usize]) -> Rule {
    match (ids, table) {
        (&[b], &[_, width]) => Ok(vec![b, width]),
        (&[b, n], &[_, width]) => Ok(vec![b, width, 1, n]),
        _ => Err(format!("table {table:?} has no rows for ids {ids:?}")),
    }
}

/// Sines and cosines of numbers `(B,)` or `(B, n)` by so many frequencies.
pub fn sinusoid(ids: &[usize], frequencies: usize) -> Rule {
    match *ids {
        [b] => Ok(vec![b, 2 * frequencies]),
        [b, n] => Ok(vec![b, n * 2 * frequencies]),
        _ => Err(format!("sinusoid does not take {ids:?}")),
    }
}

/// Features of tokens `(B, N, C)` as a map.
pub fn tokens(states: &[usize]) -> Rule {
    match *states {
        [b, n, c] if n > 0 && c > 0 => Ok(vec![b, c, 1, n]),
        _ => Err(format!("{states:?} are no features (B, N, C) of tokens")),
    }
}

/// The same back.
pub fn states(x: &[usize]) -> Rule {
    match *x {
        [b, c, 1, n] if n > 0 && c > 0 => Ok(vec![b, n, c]),
        _ => Err(format!("{x:?} is no map (B, C, 1, N) of tokens")),
    }
}

/// One of the tokens of x `(B, C, 1, N)` with ids `(B, N)`.
pub fn token_at(x: &[usize], ids: &[usize]) -> Rule {
    match (x, ids) {
        (&[b, c, 1, n], &[b_of_ids, n_of_ids]) if (b, n) == (b_of_ids, n_of_ids) && n > 0 => Ok(vec![b, c]),
        _ => Err(format!("{ids:?} are no ids of the tokens {x:?}")),
    }
}

/// Attention of q `(B, C, H, W)` to keys and values of one shape, which has q's B and C, and to their mask `(B or 1, keys)`.
pub fn attention(q: &[usize], k: &[usize], v: &[usize], heads: usize, mask: Mask<&[usize]>) -> Rule {
    let (&[b, c, h, w], &[bk, ck, hk, wk]) = (q, k) else {
        return Err(format!("attention: shapes {q:?}, {k:?}, {v:?}"));
    };
    if heads == 0 || !c.is_multiple_of(heads) || c == 0 {
        return Err(format!("attention: shape {q:?} with {heads} heads"));
    }
    if ck < c && ck > 0 && c.is_multiple_of(ck) && ck.is_multiple_of(c / heads) {
        let groups = ck / (c / heads);
        return Err(format!(
            "attention: {groups} heads of keys for {heads} of queries: grouped-query attention is not supported; repeat \
             the heads of keys and values in the weights"
        ));
    }
    if k != v || (bk, ck) != (b, c) || h * w == 0 || hk * wk == 0 {
        return Err(format!("attention: queries {q:?}, keys {k:?} and values {v:?} do not fit together"));
    }
    match mask {
        Mask::Causal if h * w != hk * wk => {
            Err(format!("attention: a causal mask of {} queries and {} keys, expected as many", h * w, hk * wk))
        }
        Mask::Padding(seen) if seen != [b, hk * wk] && seen != [1, hk * wk] => {
            Err(format!("attention: a mask of shape {seen:?} for {b} rows of {} keys", hk * wk))
        }
        _ => Ok(q.to_vec()),
    }
}

/// A sum where axes of length 1 are repeated.
pub fn add(x: &[usize], y: &[usize]) -> Rule {
    let axis = |(x, y): (&usize, &usize)| match (*x, *y) {
        (x, y) if x == y => Some(x),
        (1, n) | (n, 1) => Some(n),
        _ => None,
    };
    let sum: Option<Vec<usize>> = x.iter().zip(y).map(axis).collect();
    sum.filter(|_| x.len() == y.len()).ok_or_else(|| format!("cannot add {x:?} and {y:?}"))
}

/// A product of values of one shape.
pub fn mul(x: &[usize], y: &[usize]) -> Rule {
    if x == y { Ok(x.to_vec()) } else { Err(format!("cannot multiply {x:?} and {y:?}")) }
}

/// x `(B, C, H, W)` with v `(B or 1, C)` at every pixel.
pub fn per_channel(x: &[usize], v: &[usize]) -> Rule {
    match (x, v) {
        (&[b, c, _, _], &[bv, cv]) if c == cv && (b == bv || bv == 1) => Ok(x.to_vec()),
        _ => Err(format!("{v:?} has no value for each channel of {x:?}")),
    }
}

/// Columns `start .. start + len` of x `(B, C)`.
pub fn columns(x: &[usize], start: usize, len: usize) -> Rule {
    match *x {
        [b, c] if start.checked_add(len).is_some_and(|end| end <= c) => Ok(vec![b, len]),
        _ => Err(format!("{x:?} has no columns {start} to {}", start.saturating_add(len))),
    }
}

/// x and y joined along an axis, equal in the others.
pub fn concat(x: &[usize], y: &[usize], axis: usize) -> Rule {
    let fits = |at: usize| at == axis || x[at] == y[at];
    if axis == 0 || axis >= x.len() || x.len() != y.len() || !(0..x.len()).all(fits) {
        return Err(format!("cannot join {x:?} and {y:?} along axis {axis}"));
    }
    let mut dims = x.to_vec();
    dims[axis] += y[axis];
    match dims[1..].contains(&0) {
        true => Err(format!("cannot join {x:?} and {y:?}: one is empty")),
        false => Ok(dims),
    }
}

/// A part of x along an axis.
pub fn slice(x: &[usize], axis: usize, start: usize, len: usize) -> Rule {
    let mut dims = x.to_vec();
    match dims.get_mut(axis) {
        Some(dim) if len > 0 && start.checked_add(len).is_some_and(|end| end <= *dim) => *dim = len,
        _ => return Err(format!("there is no {start} to {start} + {len} along axis {axis} of {x:?}")),
    }
    Ok(dims)
}

/// One half of the channels of x `(B, 2C, H, W)` gated by the other.
pub fn gated(x: &[usize]) -> Rule {
    match *x {
        [b, c, h, w] if c > 0 && c.is_multiple_of(2) => Ok(vec![b, c / 2, h, w]),
        _ => Err(format!("{x:?} is no map of two halves of channels")),
    }
}

/// Pixels of x `(B, C, H, W)` turned by angles `(pairs, pixels)`.
pub fn rotary(x: &[usize], angles: &[usize]) -> Rule {
    match (x, angles) {
        (&[_, c, h, w], &[pairs, pixels])
            if pairs > 0 && c > 0 && c.is_multiple_of(2 * pairs) && h * w == pixels && pixels > 0 =>
        {
            Ok(x.to_vec())
        }
        _ => Err(format!("angles {angles:?} of (pairs, pixels) do not fit {x:?}")),
    }
}

/// Every pixel of x `(B, side²·C, H, W)` a patch.
pub fn shuffle(x: &[usize], side: usize) -> Rule {
    match *x {
        [b, c, h, w] if side > 0 && c.is_multiple_of(side * side) => Ok(vec![b, c / (side * side), side * h, side * w]),
        _ => Err(format!("the channels of {x:?} are no patches of {side}x{side}")),
    }
}

/// Every patch of x `(B, C, side·H, side·W)` a pixel.
pub fn unshuffle(x: &[usize], side: usize) -> Rule {
    match *x {
        [b, c, h, w] if side > 0 && h.is_multiple_of(side) && w.is_multiple_of(side) => {
            Ok(vec![b, c * side * side, h / side, w / side])
        }
        _ => Err(format!("{x:?} is not made of patches of {side}x{side}")),
    }
}

/// The pixels of x in other rows.
pub fn grid(x: &[usize], [h, w]: [usize; 2]) -> Rule {
    match *x {
        [b, c, xh, xw] if xh.checked_mul(xw) == h.checked_mul(w) => Ok(vec![b, c, h, w]),
        _ => Err(format!("the pixels of {x:?} do not fill {h}x{w}")),
    }
}

/// Height and width doubled.
pub fn upsample_2x(x: &[usize]) -> Rule {
    sides("upsample", x, |h, w| Some([2 * h, 2 * w]))
}

/// Height and width halved; a last odd row or column is dropped.
pub fn avg_pool_2x(x: &[usize]) -> Rule {
    sides("pool", x, |h, w| (h > 1 && w > 1).then_some([h / 2, w / 2]))
}

/// One row and one column more.
pub fn pad_right_bottom(x: &[usize]) -> Rule {
    sides("pad", x, |h, w| Some([h + 1, w + 1]))
}

fn sides(operation: &str, x: &[usize], new: impl Fn(usize, usize) -> Option<[usize; 2]>) -> Rule {
    let found = match *x {
        [b, c, h, w] => new(h, w).map(|[h, w]| vec![b, c, h, w]),
        _ => None,
    };
    found.ok_or_else(|| format!("{operation} does not take {x:?}"))
}
