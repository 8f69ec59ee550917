//! Multi-head attention over the pixels of maps. A thread takes a block of one head's queries: their scores are all that
//! it holds, and never all of a head's. Backward computes them again, as FlashAttention does (Dao et al. 2022,
//! arXiv:2205.14135); the keys of a block are left whole, since a block of scores fits a core's cache, and a softmax
//! then is one pass over whole rows.

use super::simd::{dot, exp, max_of, sum_by, vectorised};
use super::{Gemm, Values, fits, on_cpu_f32, values};
use crate::shapes;
use candle_core::{CpuStorage, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mask<V> {
    /// All.
    #[default]
    None,
    /// Those up to its own place, of as many keys as queries.
    Causal,
    /// Those at which this is 1 and not 0: `(B or 1, keys)`.
    Padding(V),
}

impl<V> Mask<V> {
    /// The same kind of mask, of another value.
    pub fn map<W>(self, f: impl FnOnce(V) -> W) -> Mask<W> {
        match self {
            Mask::None => Mask::None,
            Mask::Causal => Mask::Causal,
            Mask::Padding(keys) => Mask::Padding(f(keys)),
        }
    }

    /// Of a reference.
    pub fn as_ref(&self) -> Mask<&V> {
        match self {
            Mask::None => Mask::None,
            Mask::Causal => Mask::Causal,
            Mask::Padding(keys) => Mask::Padding(keys),
        }
    }
}

/// What is added to the score of a key that a query does not see: enough that its weight is zero in every precision, and
/// finite, so that a sample whose keys are all padding has weights nevertheless.
pub const UNSEEN: f64 = -10_000.0;

/// q `(B, C, H, W)`, k and v `(B, C, H', W')`, C split into `heads` runs of channels, scores scaled by 1/√(C/heads),
/// softmax over the keys that `mask` shows. Returns `(B, C, H, W)`. f32 on the CPU runs fused, anything else through
/// [`attention_composite`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask<&Tensor>) -> Result<Tensor> {
    if !on_cpu_f32(&[q, k, v]) {
        return attention_composite(q, k, v, heads, mask);
    }
    fits(shapes::attention(q.dims(), k.dims(), v.dims(), heads, mask.map(Tensor::dims)))?;
    let bias = match mask {
        Mask::Padding(keys) => Mask::Padding(padding_bias(keys)?.flatten_all()?.to_vec1()?),
        Mask::None => Mask::None,
        Mask::Causal => Mask::Causal,
    };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention { heads, bias })
}

/// The same by candle's own operations.
pub fn attention_composite(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask<&Tensor>) -> Result<Tensor> {
    fits(shapes::attention(q.dims(), k.dims(), v.dims(), heads, mask.map(Tensor::dims)))?;
    let (b, c, h, w) = q.dims4()?;
    let split = |t: &Tensor| t.contiguous()?.flatten_from(2)?.reshape((b * heads, c / heads, ()));
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let scale = 1.0 / ((c / heads) as f64).sqrt();
    let scores = (q.t()?.contiguous()?.matmul(&k)? * scale)?;
    let (queries, keys) = (q.dim(2)?, k.dim(2)?);
    let scores = match mask {
        Mask::None => scores,
        Mask::Causal => scores.broadcast_add(&causal_bias(queries)?.to_device(q.device())?.to_dtype(q.dtype())?)?,
        Mask::Padding(seen) => {
            let bias = padding_bias(seen)?.to_dtype(q.dtype())?.reshape(((), 1, 1, keys))?;
            scores.reshape((b, heads, queries, keys))?.broadcast_add(&bias)?.reshape((b * heads, queries, keys))?
        }
    };
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    v.matmul(&weights.t()?.contiguous()?)?.reshape((b, c, h, w))
}

/// What is added to scores `(queries, keys)`, f32: a row for each query, which sees itself and what is before it.
pub fn causal_bias(tokens: usize) -> Result<Tensor> {
    let bias = |query: usize| (0..tokens).map(move |key| if key > query { UNSEEN as f32 } else { 0.0 });
    Tensor::from_iter((0..tokens).flat_map(bias), &Device::Cpu)?.reshape((tokens, tokens))
}

/// And where keys are padding, `(B or 1, keys)` f32.
pub fn padding_bias(seen: &Tensor) -> Result<Tensor> {
    seen.detach().to_dtype(DType::F32)?.affine(-UNSEEN, UNSEEN)
}

struct Attention {
    heads: usize,
    /// With the bias of padded keys.
    bias: Mask<Vec<f32>>,
}

/// Scores that a thread holds at a time: a megabyte, which stays in a core's own cache.
const SCORES: usize = 1 << 18;

/// The sizes of one head.
#[derive(Clone, Copy)]
struct Head {
    width: usize,
    queries: usize,
    keys: usize,
    /// Queries of a block.
    rows: usize,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let head = self.head(q_layout.dims(), k_layout.dims());
        let (q, k, v) = (values(q, q_layout, name)?, values(k, k_layout, name)?, values(v, v_layout, name)?);
        let mut y = vec![0f32; q.len()];
        y.par_chunks_mut(head.of_queries()).enumerate().for_each_init(Vec::new, |scores, (i, y)| {
            let inputs = [&q[head.queries_at(i)], &k[head.keys_at(i)], &v[head.keys_at(i)]];
            if head.blocks() == 1 {
                return self.mix(inputs, head, i, 0..head.queries, scores, y);
            }
            let made = (0..head.blocks()).into_par_iter().map_init(Vec::new, |scores, block| {
                let range = head.block(block);
                let mut part = vec![0f32; head.width * range.len()];
                self.mix(inputs, head, i, range, scores, &mut part);
                part
            });
            let made: Vec<Vec<f32>> = made.collect();
            made.iter().enumerate().for_each(|(block, part)| head.put(part, block, y));
        });
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let head = self.head(q.dims(), k.dims());
        let grad = grad.contiguous()?;
        let name = self.name();
        let (qs, ks, vs, gs) =
            (Values::of(q, name)?, Values::of(k, name)?, Values::of(v, name)?, Values::of(&grad, name)?);
        let (qs, ks, vs, gs) = (&*qs, &*ks, &*vs, &*gs);
        let mut dq = vec![0f32; qs.len()];
        let heads = qs.len() / head.of_queries();
        let [mut dk, mut dv] = [(); 2].map(|()| vec![0f32; ks.len()]);
        let of_keys = dk.par_chunks_mut(head.of_keys()).zip(dv.par_chunks_mut(head.of_keys()));
        dq.par_chunks_mut(head.of_queries()).zip(of_keys).enumerate().for_each(|(i, (dq, (dk, dv)))| {
            let (queries, keys) = (head.queries_at(i), head.keys_at(i));
            let inputs = [&qs[queries.clone()], &ks[keys.clone()], &vs[keys], &gs[queries]];
            if head.blocks() == 1 {
                let mut scratch = Scratch::default();
                return self.backward_block(inputs, head, i, 0..head.queries, &mut scratch, [dq, dk, dv]);
            }
            // Few heads: more than one thread for each, with sums of its own that are added in order.
            let parts = rayon::current_num_threads().div_ceil(heads).min(head.blocks());
            let part = |part: usize| {
                let blocks = part * head.blocks() / parts..(part + 1) * head.blocks() / parts;
                let (mut scratch, mut of_queries) = (Scratch::default(), vec![]);
                let [mut dk, mut dv] = [(); 2].map(|()| vec![0f32; head.of_keys()]);
                for block in blocks.clone() {
                    let range = head.block(block);
                    let mut dq = vec![0f32; head.width * range.len()];
                    self.backward_block(inputs, head, i, range, &mut scratch, [&mut dq, &mut dk, &mut dv]);
                    of_queries.push((block, dq));
                }
                (of_queries, dk, dv)
            };
            let made: Vec<_> = (0..parts).into_par_iter().map(part).collect();
            for (of_queries, more_dk, more_dv) in made {
                of_queries.iter().for_each(|(block, part)| head.put(part, *block, dq));
                dk.iter_mut().zip(more_dk).for_each(|(sum, more)| *sum += more);
                dv.iter_mut().zip(more_dv).for_each(|(sum, more)| *sum += more);
            }
        });
        let tensor = |values, of: &Tensor| Tensor::from_vec(values, of.dims(), of.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

/// A thread's memory for a block: weights, and the gradient of their scores.
#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    ds: Vec<f32>,
}

impl Head {
    fn of_queries(self) -> usize {
        self.width * self.queries
    }

    fn of_keys(self) -> usize {
        self.width * self.keys
    }

    /// Where the queries of the i-th head lie, and its keys.
    fn queries_at(self, i: usize) -> Range<usize> {
        i * self.of_queries()..(i + 1) * self.of_queries()
    }

    fn keys_at(self, i: usize) -> Range<usize> {
        i * self.of_keys()..(i + 1) * self.of_keys()
    }

    fn blocks(self) -> usize {
        self.queries.div_ceil(self.rows)
    }

    fn block(self, i: usize) -> Range<usize> {
        i * self.rows..((i + 1) * self.rows).min(self.queries)
    }

    /// Puts a block `(width, rows)` in its place in `(width, queries)`.
    fn put(self, part: &[f32], block: usize, whole: &mut [f32]) {
        let range = self.block(block);
        for (row, part) in whole.chunks_exact_mut(self.queries).zip(part.chunks_exact(range.len())) {
            row[range.clone()].copy_from_slice(part);
        }
    }
}

impl Attention {
    /// Shapes are those that `attention` let in.
    fn head(&self, q: &[usize], k: &[usize]) -> Head {
        let (queries, keys) = (q[2] * q[3], k[2] * k[3]);
        Head { width: q[1] / self.heads, queries, keys, rows: (SCORES / keys).max(16) }
    }

    /// softmax(qᵀk/√d) of some of a head's queries: rows are queries. q is `(width, queries)`, k `(width, keys)`.
    fn weights(&self, [q, k]: [&[f32]; 2], head: Head, i: usize, range: Range<usize>, scores: &mut Vec<f32>) {
        let Head { width, queries, keys, .. } = head;
        scores.resize(range.len() * keys, 0.0);
        let alpha = 1.0 / (width as f32).sqrt();
        let (lhs, rhs) = ((&q[range.start..], 1, queries), (k, keys, 1));
        Gemm { m: range.len(), n: keys, k: width, lhs, rhs, alpha, accumulate: false }.run(scores);
        match &self.bias {
            Mask::None => {}
            Mask::Causal => {
                for (query, row) in range.zip(scores.chunks_exact_mut(keys)) {
                    row[query + 1..].iter_mut().for_each(|score| *score += UNSEEN as f32);
                }
            }
            Mask::Padding(bias) => {
                let bias = &bias[i / self.heads * keys % bias.len()..][..keys];
                let rows = scores.chunks_exact_mut(keys);
                rows.for_each(|row| row.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias));
            }
        }
        softmax(scores, keys);
    }

    /// What a block of queries sees, `(width, rows)`.
    fn mix(
        &self,
        [q, k, v]: [&[f32]; 3],
        head: Head,
        i: usize,
        range: Range<usize>,
        scores: &mut Vec<f32>,
        y: &mut [f32],
    ) {
        let (m, n, keys) = (head.width, range.len(), head.keys);
        self.weights([q, k], head, i, range, scores);
        Gemm { m, n, k: keys, lhs: (v, keys, 1), rhs: (scores, 1, keys), alpha: 1.0, accumulate: false }.run(y);
    }

    /// dq of a block, `(width, rows)`; dk and dv get their share, which the first block of a head writes.
    fn backward_block(
        &self,
        [q, k, v, grad]: [&[f32]; 4],
        head: Head,
        i: usize,
        range: Range<usize>,
        Scratch { p, ds }: &mut Scratch,
        [dq, dk, dv]: [&mut [f32]; 3],
    ) {
        let Head { width, queries, keys, .. } = head;
        let (rows, accumulate) = (range.len(), head.blocks() > 1);
        let [q_rows, grad_rows] = [q, grad].map(|x| &x[range.start..]);
        self.weights([q, k], head, i, range, p);
        ds.resize(rows * keys, 0.0);
        // dP = gradᵀ·v.
        let (lhs, rhs) = ((grad_rows, 1, queries), (v, keys, 1));
        Gemm { m: rows, n: keys, k: width, lhs, rhs, alpha: 1.0, accumulate: false }.run(ds);
        through_softmax(ds, p, keys);
        let alpha = 1.0 / (width as f32).sqrt();
        let of_keys = |lhs, rhs, alpha| Gemm { m: width, n: keys, k: rows, lhs, rhs, alpha, accumulate };
        of_keys((grad_rows, queries, 1), (p, keys, 1), 1.0).run(dv);
        of_keys((q_rows, queries, 1), (ds, keys, 1), alpha).run(dk);
        let (lhs, rhs) = ((k, keys, 1), (&ds[..], 1, keys));
        Gemm { m: width, n: rows, k: keys, lhs, rhs, alpha, accumulate: false }.run(dq);
    }
}

vectorised! {
    /// Softmax of every row.
    fn softmax(scores: &mut [f32], width: usize) {
        for row in scores.chunks_exact_mut(width) {
            let max = max_of(row);
            row.iter_mut().for_each(|s| *s = exp(*s - max));
            let scale = 1.0 / sum_by(row, |s| s);
            row.iter_mut().for_each(|s| *s *= scale);
        }
    }
}

vectorised! {
    /// dS = P∘(dP − Σ dP∘P) row by row, in the memory of dP.
    fn through_softmax(ds: &mut [f32], p: &[f32], width: usize) {
        for (ds, p) in ds.chunks_exact_mut(width).zip(p.chunks_exact(width)) {
            let sum = dot(ds, p);
            ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - sum));
        }
    }
}
