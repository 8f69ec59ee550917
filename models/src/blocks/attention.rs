//! Self-attention over pixels with a residual connection (diffusers' `Attention` in its UNet2D form).

use super::add_scaled;
use crate::backend::{Backend, Block};
use crate::layers::{Conv2d, GroupNorm, Scope};
use crate::{Error, Result};

/// The block.
#[derive(Clone, Debug)]
pub struct AttentionBlock {
    group_norm: Option<GroupNorm>,
    to_q: Conv2d,
    to_k: Conv2d,
    to_v: Conv2d,
    to_out: Conv2d,
    heads: usize,
    output_scale: f64,
}

/// Its sizes.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// In and out.
    pub channels: usize,
    /// Channels of one head; one head over all channels where none.
    pub head_dim: Option<usize>,
    /// Groups of the norm before it, if there is one.
    pub groups: Option<usize>,
    /// Added to the norm's variance.
    pub eps: f64,
    /// The sum with the input is divided by this.
    pub output_scale: f64,
}

impl AttentionBlock {
    /// Takes its parameters from `scope`.
    pub fn build(mut scope: Scope, shape: AttentionShape) -> Result<Self> {
        let AttentionShape { channels, head_dim, groups, eps, output_scale } = shape;
        let head_dim = head_dim.unwrap_or(channels);
        let heads = channels / head_dim;
        if heads == 0 {
            return Err(Error::Config(format!(
                "attention_head_dim {head_dim} is larger than a block's {channels} channels"
            )));
        }
        // Where the head width does not divide the channels, diffusers projects to the largest multiple.
        let inner = heads * head_dim;
        Ok(AttentionBlock {
            group_norm: match groups {
                Some(groups) => Some(scope.group_norm("group_norm", channels, groups, eps)?),
                None => None,
            },
            to_q: scope.pointwise("to_q", [channels, inner], false)?,
            to_k: scope.pointwise("to_k", [channels, inner], false)?,
            to_v: scope.pointwise("to_v", [channels, inner], false)?,
            to_out: scope.pointwise("to_out.0", [inner, channels], true)?,
            heads,
            output_scale,
        })
    }
}

impl Block for AttentionBlock {
    fn forward<B: Backend>(&self, b: &B, x: &B::Value, _: &[&B::Value]) -> Result<B::Value> {
        let h = match &self.group_norm {
            Some(norm) => b.group_norm(x, norm, None)?,
            None => x.clone(),
        };
        let (q, k, v) = (b.conv2d(&h, &self.to_q)?, b.conv2d(&h, &self.to_k)?, b.conv2d(&h, &self.to_v)?);
        let h = b.conv2d(&b.attention(&q, &k, &v, self.heads)?, &self.to_out)?;
        add_scaled(b, x, &h, self.output_scale)
    }
}
