#!/bin/sh
# The compiler, as cargo calls it: RUSTC_WRAPPER. Coverage and the sanitizer are for the crates that read bytes from outside;
# the engines and the arithmetic are compiled as they are, which takes minutes in the place of hours.
rustc=$1
shift
name='' before=''
for arg; do
    [ "$before" = --crate-name ] && name=$arg
    before=$arg
done
case $name in
    dmd* | onnx | ort | metadata | safetensors | unet_config | tokenizer | text_encoder | autoencoder | scheduler | tokenizers | npy | zip | picture) exec "$rustc" "$@" ;;
    prost | serde_json | image | image_webp | png | gif | weezl | zune_jpeg | fdeflate | zlib_rs | flate2) exec "$rustc" "$@" ;;
esac
n=$#
while [ "$n" -gt 0 ]; do
    arg=$1
    shift
    case $arg in
        -Cpasses=* | -Cllvm-args=-sanitizer* | -Zsanitizer=* | -Ccodegen-units=1) ;;
        *) set -- "$@" "$arg" ;;
    esac
    n=$((n - 1))
done
exec "$rustc" "$@"
