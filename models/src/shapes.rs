//! The shape rule of every operation, told once: what it takes, and the shape of what it gives. Interpreters that have no
//! tensors (cost, the exporter's graph) infer by these, and the others' results are held against them by the tests.

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

/// Rows of a table `(entries, width)` for ids `(B,)`.
pub fn embedding(ids: &[usize], table: &[usize]) -> Rule {
    match (ids, table) {
        (&[b], &[_, width]) => Ok(vec![b, width]),
        _ => Err(format!("table {table:?} has no rows for ids {ids:?}")),
    }
}

/// Sines and cosines of ids `(B,)` by so many frequencies.
pub fn sinusoid(ids: &[usize], frequencies: usize) -> Rule {
    match *ids {
        [b] => Ok(vec![b, 2 * frequencies]),
        _ => Err(format!("sinusoid does not take {ids:?}")),
    }
}

/// Attention of q `(B, C, H, W)` to keys and values of one shape, which has q's B and C.
pub fn attention(q: &[usize], k: &[usize], v: &[usize], heads: usize) -> Rule {
    match (q, k) {
        ([b, c, _, _], [bk, ck, _, _]) if k == v && b == bk && c == ck && heads > 0 && c.is_multiple_of(heads) => {
            Ok(q.to_vec())
        }
        _ => Err(format!("attention of {heads} heads does not take {q:?}, {k:?} and {v:?}")),
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

/// `(B, C₁, H, W)` and `(B, C₂, H, W)` joined along channels.
pub fn concat(x: &[usize], y: &[usize]) -> Rule {
    match (x, y) {
        (&[b, c1, h, w], &[b2, c2, h2, w2]) if (b, h, w) == (b2, h2, w2) => Ok(vec![b, c1 + c2, h, w]),
        _ => Err(format!("concat does not take {x:?} and {y:?}")),
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
