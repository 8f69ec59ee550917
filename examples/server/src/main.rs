//! `dmd-server FILE.onnx [ADDRESS] [--threads N]`: pictures of an exported file by HTTP.

use anyhow::{Context, Result, bail};
use dmd_runtime::{Generator, Options};
use dmd_server::{Limits, app};

const USAGE: &str = "usage: dmd-server FILE.onnx [ADDRESS, 127.0.0.1:8080 by default] [--threads N]";

#[tokio::main]
async fn main() -> Result<()> {
    let (mut words, mut threads) = (Vec::new(), None);
    let mut arguments = std::env::args().skip(1);
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "--threads" => threads = Some(arguments.next().and_then(|n| n.parse().ok()).context(USAGE)?),
            option if option.starts_with('-') => bail!("{option}: no such option; {USAGE}"),
            _ => words.push(word),
        }
    }
    let (file, address) = match words.as_slice() {
        [file] => (file, "127.0.0.1:8080"),
        [file, address] => (file, address.as_str()),
        _ => bail!(USAGE),
    };
    let generator = Generator::load(file, Options { threads, ..Options::default() })?;
    generator.warm_up()?;
    eprintln!("{file}: {}", generator.placement());
    let listener =
        tokio::net::TcpListener::bind(address).await.with_context(|| format!("{address} cannot be taken"))?;
    eprintln!("http://{}/", listener.local_addr()?);
    // Requests that are under way are answered first.
    axum::serve(listener, app(generator, Limits::default())?).with_graceful_shutdown(asked_to_end()).await?;
    Ok(())
}

async fn asked_to_end() {
    let interrupted = tokio::signal::ctrl_c();
    #[cfg(unix)]
    if let Ok(mut terminated) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! { _ = interrupted => {}, _ = terminated.recv() => {} }
        return;
    }
    _ = interrupted.await;
}
