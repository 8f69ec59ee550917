//! Loads a server from this machine: `cargo run --release --example load -- ADDRESS SECONDS CONNECTIONS [PROCESS]`. Each
//! connection asks for one picture after the other; told are answers in a second, how long they took, refusals, failures, and
//! the memory of the server, where its process is named (Linux).

use std::io::{BufRead, BufReader, Read, Result, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (address, seconds, connections, process) = match arguments.as_slice() {
        [address, seconds, connections] => (address, seconds, connections, None),
        [address, seconds, connections, process] => (address, seconds, connections, Some(process)),
        _ => return Err("usage: load ADDRESS SECONDS CONNECTIONS [PROCESS]".into()),
    };
    let (seconds, connections): (u64, u64) = (seconds.parse()?, connections.parse()?);
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let memory = || process.map(|process| resident_kib(process));
    let clients: Vec<_> = (0..connections)
        .map(|number| {
            let address = address.clone();
            thread::spawn(move || client(&address, number, end))
        })
        .collect();
    // Ten looks at the memory on the way.
    let step = Duration::from_millis(seconds * 100);
    let looks: Vec<_> = (0..9).filter_map(|_| (thread::sleep(step), memory()).1).collect();
    let (mut times_ms, mut refused, mut failed) = (Vec::new(), 0, 0);
    for client in clients {
        let (times, refusals, failures) = client.join().map_err(|_| "a client has ended")?;
        times_ms.extend(times);
        (refused, failed) = (refused + refusals, failed + failures);
    }
    times_ms.sort_by(f64::total_cmp);
    let at = |share: f64| times_ms.get(((times_ms.len() as f64 - 1.0) * share) as usize).copied().unwrap_or(f64::NAN);
    let took = begun.elapsed().as_secs_f64();
    println!("{} pictures in {took:.1} s, {:.0} a second", times_ms.len(), times_ms.len() as f64 / took);
    println!("ms: {:.1} median, {:.1} p90, {:.1} p99, {:.1} at most", at(0.5), at(0.9), at(0.99), at(1.0));
    println!("{refused} refused, {failed} failed");
    if !looks.is_empty() {
        println!("memory in KiB: {looks:?}");
    }
    Ok(())
}

fn client(address: &str, number: u64, end: Instant) -> (Vec<f64>, u64, u64) {
    let (mut times, mut refused, mut failed) = (Vec::new(), 0, 0);
    let mut seed = number << 32;
    while Instant::now() < end {
        let Ok(stream) = TcpStream::connect(address) else {
            failed += 1;
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        let mut stream = BufReader::new(stream);
        while Instant::now() < end {
            let begun = Instant::now();
            seed += 1;
            match ask(&mut stream, seed) {
                Ok((200, png)) if png.starts_with(b"\x89PNG") => times.push(begun.elapsed().as_secs_f64() * 1e3),
                Ok((503, _)) => {
                    refused += 1;
                    thread::sleep(Duration::from_millis(10));
                }
                _ => {
                    failed += 1;
                    break;
                }
            }
        }
    }
    (times, refused, failed)
}

fn ask(stream: &mut BufReader<TcpStream>, seed: u64) -> Result<(u16, Vec<u8>)> {
    write!(stream.get_mut(), "GET /picture.png?seed={seed} HTTP/1.1\r\nHost: load\r\n\r\n")?;
    let (mut status, mut length) = (0, 0);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some(code) = line.strip_prefix("HTTP/1.1 ") {
            status = code.get(..3).and_then(|code| code.parse().ok()).unwrap_or(0);
        }
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
            length = n.parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((status, body))
}

fn resident_kib(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
