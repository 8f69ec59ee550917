//! Multi-head attention over pixels, one head of one sample at a time: its score matrix lives in a thread's scratch
//! memory and is never stored. Backward computes it again.

use super::simd::{dot, exp, max_of, sum_by, vectorised};
use super::{Gemm, Values, on_cpu_f32, values};
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// q, k, v `(B, C, H, W)`, C split into `heads` runs of channels, scores scaled by 1/√(C/heads), softmax over keys.
/// Returns `(B, C, H, W)`. f32 on the CPU runs fused, anything else through [`attention_composite`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    if !on_cpu_f32(&[q, k, v]) {
        return attention_composite(q, k, v, heads);
    }
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention { heads })
}

/// The same by candle's own operations.
pub fn attention_composite(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, c, h, w) = q.dims4()?;
    if heads == 0 || !c.is_multiple_of(heads) {
        bail!("attention: shape {:?} with {heads} heads", q.dims());
    }
    let split = |t: &Tensor| t.contiguous()?.reshape((b * heads, c / heads, h * w));
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let scale = 1.0 / ((c / heads) as f64).sqrt();
    let scores = (q.t()?.contiguous()?.matmul(&k)? * scale)?;
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    v.matmul(&weights.t()?.contiguous()?)?.reshape((b, c, h, w))
}

struct Attention {
    heads: usize,
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
        let (width, pixels) = self.sizes(q_layout.dims())?;
        if q_layout.dims() != k_layout.dims() || q_layout.dims() != v_layout.dims() {
            bail!("attention: shapes {:?}, {:?}, {:?}", q_layout.dims(), k_layout.dims(), v_layout.dims());
        }
        let name = self.name();
        let (q, k, v) = (values(q, q_layout, name)?, values(k, k_layout, name)?, values(v, v_layout, name)?);
        let head = (width * pixels).max(1);
        let mut y = vec![0f32; q.len()];
        y.par_chunks_mut(head).enumerate().for_each_init(Vec::new, |scores, (i, y)| {
            let at = i * head..(i + 1) * head;
            weights(&q[at.clone()], &k[at.clone()], width, pixels, scores);
            Gemm {
                m: width,
                n: pixels,
                k: pixels,
                lhs: (&v[at], pixels, 1),
                rhs: (scores, 1, pixels),
                alpha: 1.0,
                accumulate: false,
            }
            .run(y);
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
        let (width, pixels) = self.sizes(q.dims())?;
        let grad = grad.contiguous()?;
        let name = self.name();
        let (qs, ks, vs, gs) =
            (Values::of(q, name)?, Values::of(k, name)?, Values::of(v, name)?, Values::of(&grad, name)?);
        let (qs, ks, vs, gs) = (&*qs, &*ks, &*vs, &*gs);
        let head = (width * pixels).max(1);
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0f32; qs.len()]);
        dq.par_chunks_mut(head).zip(dk.par_chunks_mut(head)).zip(dv.par_chunks_mut(head)).enumerate().for_each_init(
            || (Vec::new(), Vec::new()),
            |(weights_buffer, dscores), (i, ((dq, dk), dv))| {
                let at = i * head..(i + 1) * head;
                let inputs = [&qs[at.clone()], &ks[at.clone()], &vs[at.clone()], &gs[at]];
                backward_head(inputs, width, pixels, weights_buffer, dscores, [dq, dk, dv]);
            },
        );
        let tensor = |values| Tensor::from_vec(values, q.dims(), q.device()).map(Some);
        Ok((tensor(dq)?, tensor(dk)?, tensor(dv)?))
    }
}

impl Attention {
    /// Channels per head, pixels.
    fn sizes(&self, dims: &[usize]) -> Result<(usize, usize)> {
        match dims {
            &[_, c, h, w] if self.heads > 0 && c % self.heads == 0 => Ok((c / self.heads, h * w)),
            _ => bail!("attention: shape {dims:?} with {} heads", self.heads),
        }
    }
}

/// softmax(qᵀk/√d) of one head: rows are queries. q and k are `(width, pixels)`.
fn weights(q: &[f32], k: &[f32], width: usize, pixels: usize, scores: &mut Vec<f32>) {
    scores.resize(pixels * pixels, 0.0);
    let alpha = 1.0 / (width as f32).sqrt();
    Gemm { m: pixels, n: pixels, k: width, lhs: (q, 1, pixels), rhs: (k, pixels, 1), alpha, accumulate: false }
        .run(scores);
    softmax(scores, pixels);
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

fn backward_head(
    [q, k, v, grad]: [&[f32]; 4],
    width: usize,
    pixels: usize,
    p: &mut Vec<f32>,
    ds: &mut Vec<f32>,
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    weights(q, k, width, pixels, p);
    ds.resize(pixels * pixels, 0.0);
    // dP = gradᵀ·v.
    Gemm { m: pixels, n: pixels, k: width, lhs: (grad, 1, pixels), rhs: (v, pixels, 1), alpha: 1.0, accumulate: false }
        .run(ds);
    through_softmax(ds, p, pixels);
    let alpha = 1.0 / (width as f32).sqrt();
    let product = |lhs, rhs, alpha| Gemm { m: width, n: pixels, k: pixels, lhs, rhs, alpha, accumulate: false };
    product((grad, pixels, 1), (p, pixels, 1), 1.0).run(dv);
    product((q, pixels, 1), (ds, pixels, 1), alpha).run(dk);
    product((k, pixels, 1), (ds, 1, pixels), alpha).run(dq);
}
