//! From the machine's network into the lab's: the one port that a person's client uses.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};

/// Hands every connection of `outside` on to this port of the lab's loopback. To be called in the
/// lab's network: threads are in the network of the thread that makes them.
pub fn serve(outside: TcpListener, port: u16) -> io::Result<()> {
    let named = std::thread::Builder::new().name("forward".to_owned());
    named.spawn(move || {
        for client in outside.incoming().flatten() {
            // One that fails is its own client's trouble.
            let _ = join(client, port);
        }
    })?;
    Ok(())
}

fn join(client: TcpStream, port: u16) -> io::Result<()> {
    let server = TcpStream::connect(("127.0.0.1", port))?;
    let pairs = [(client.try_clone()?, server.try_clone()?), (server, client)];
    for (mut from, mut to) in pairs {
        std::thread::Builder::new().spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        })?;
    }
    Ok(())
}
