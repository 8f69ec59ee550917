//! Values moved and not computed: parts of maps, patches of pixels as channels and back, tables looked up.

use super::fits;
use crate::shapes;
use candle_core::{Result, Tensor, bail};

/// Where the pixels of a patch stand among the channels of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patches {
    /// `(c, row, column)`: PyTorch's pixel shuffle, the latents of Flux.
    ChannelFirst,
    /// `(row, column, c)`: the patches that DiT and its kin put out.
    ChannelLast,
}

/// `(B, side²·C, H, W)` to `(B, C, side·H, side·W)`: every pixel becomes a patch.
pub fn shuffle(x: &Tensor, side: usize, patches: Patches) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    fits(shapes::shuffle(x.dims(), side))?;
    let c = c / (side * side);
    let x = x.contiguous()?;
    match patches {
        Patches::ChannelFirst => x.reshape(vec![b, c, side, side, h, w])?.permute(vec![0, 1, 4, 2, 5, 3])?,
        Patches::ChannelLast => x.reshape(vec![b, side, side, c, h, w])?.permute(vec![0, 3, 4, 1, 5, 2])?,
    }
    .contiguous()?
    .reshape((b, c, side * h, side * w))
}

/// `(B, C, side·H, side·W)` to `(B, side²·C, H, W)`: every patch becomes a pixel.
pub fn unshuffle(x: &Tensor, side: usize, patches: Patches) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    fits(shapes::unshuffle(x.dims(), side))?;
    let (h, w) = (h / side, w / side);
    let x = x.contiguous()?.reshape(vec![b, c, h, side, w, side])?;
    match patches {
        Patches::ChannelFirst => x.permute(vec![0, 1, 3, 5, 2, 4])?,
        Patches::ChannelLast => x.permute(vec![0, 3, 5, 1, 2, 4])?,
    }
    .contiguous()?
    .reshape((b, side * side * c, h, w))
}

/// The pixels of `(B, C, H, W)` in other rows.
pub fn grid(x: &Tensor, sides: [usize; 2]) -> Result<Tensor> {
    x.reshape(fits(shapes::grid(x.dims(), sides))?)
}

/// Features of tokens `(B, N, C)` as a map `(B, C, 1, N)`.
pub fn tokens(states: &Tensor) -> Result<Tensor> {
    fits(shapes::tokens(states.dims()))?;
    states.transpose(1, 2)?.contiguous()?.unsqueeze(2)
}

/// The same back.
pub fn states(x: &Tensor) -> Result<Tensor> {
    fits(shapes::states(x.dims()))?;
    x.squeeze(2)?.transpose(1, 2)?.contiguous()
}

/// Which token of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenAt {
    /// The first with this id; the first of all where there is none.
    Id(u32),
    /// The first with the largest id.
    Largest,
}

/// Of the tokens of x `(B, C, 1, N)`, whose ids are `(B, N)`, one of each sample: `(B, C)`.
pub fn token_at(x: &Tensor, ids: &Tensor, at: TokenAt) -> Result<Tensor> {
    let [b, c] = fits(shapes::token_at(x.dims(), ids.dims()))?[..] else { bail!("token_at: {:?}", x.dims()) };
    let place = |ids: &Vec<i64>| {
        let wanted = match at {
            TokenAt::Id(id) => i64::from(id),
            TokenAt::Largest => ids.iter().copied().max().unwrap_or(0),
        };
        ids.iter().position(|id| *id == wanted).unwrap_or(0) as u32
    };
    let places: Vec<u32> = ids.to_vec2::<i64>()?.iter().map(place).collect();
    let places = Tensor::from_vec(places, (b, 1, 1), x.device())?.broadcast_as((b, c, 1))?.contiguous()?;
    x.squeeze(2)?.contiguous()?.gather(&places, 2)?.squeeze(2)
}

/// Rows of a table `(entries, width)`: ids `(B,)` to `(B, width)`, or `(B, N)` to a map `(B, width, 1, N)`.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    match *ids.dims() {
        [b, n] => table
            .index_select(&ids.contiguous()?.flatten_all()?, 0)?
            .reshape((b, n, ()))?
            .transpose(1, 2)?
            .contiguous()?
            .unsqueeze(2),
        [_] => table.index_select(ids, 0),
        _ => bail!("embedding: ids of shape {:?}, expected (B,) or (B, N)", ids.dims()),
    }
}
