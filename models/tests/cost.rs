//! The counted cost of a pass, against PyTorch's.

use dmd_models::cost::cost;
use dmd_models::{Architecture, Network, UNet, UNetConfig};
use std::path::Path;

/// torch 2.15, `FlopCounterMode` over diffusers 0.42's `UNet2DModel` of benches/peers/unet-16.json (132,759,552) and
/// unet-32.json (727,859,200), one picture.
#[test]
fn flops_are_those_that_pytorch_counts() {
    for (side, expected) in [(16, 132_759_552.0), (32, 727_859_200.0)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../benches/peers/unet-{side}.json"));
        let config = UNetConfig::from_json(&path, &std::fs::read_to_string(&path).unwrap()).unwrap();
        let weights = UNet::init(&config, &mut |_, n| vec![0.5; n]).unwrap();
        let network = Network::UNet2D(UNet::new(&config, &weights).unwrap());
        assert_eq!(cost(&network, [3, side, side]).unwrap().flops, expected);
    }
}
