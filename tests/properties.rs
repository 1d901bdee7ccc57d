//! The properties of `support/properties`, with other bytes on every run. An input that fails is
//! made small and printed; it is then added to the old inputs of its property here.

// A panic is how a test fails.
#![allow(clippy::restriction)]

#[path = "support/properties/mod.rs"]
mod properties;

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use std::panic::{catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, PoisonError};

/// How often to try to make a failing input smaller.
const TRIES: usize = 1000;

/// One case runs at a time: memory and panics are counted for the whole process.
static TURN: Mutex<()> = Mutex::new(());
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

#[test]
fn every_packet_is_answered_once() {
    let short = "0000000000000000000000000000000000000000009677000f005e78";
    let closed_while_reading = "5a000000d3000059000000000000000000000000000000000000000000000000710000000000000000000000\
                                0000000000ff000000000000000000000000000000000000bb000000e900000000000000ed";
    // A WRITE of no bytes far beyond the end, and then CLOSE.
    let empty_far_ahead = "00000000f800000000ba0000000000000000000000000000000000000000e80000000000008d000000005f0000000000007400\
                           44650000f70000f70016d600000092790000e6008100e6000000000000000000000000d00000005100b3000095000000\
                           470000ff00310000000000000000000000004c";
    check(
        properties::packets,
        250,
        &["", short, closed_while_reading, empty_far_ahead],
    );
}

#[test]
fn paths_never_leave_the_home() {
    check(
        properties::paths,
        3000,
        &["4400000000003d0000000000004d7cfc86ebf10022e954cb8200a4f5"],
    );
}

#[test]
fn parts_joined_are_the_file() {
    let early = "00af00a90000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
                 000000002d0051880000000000007bf9a3090000000000000000000000000000000000000000002b007b00000000000000060079";
    check(properties::parts, 300, &[early]);
}

#[test]
fn uploads_store_the_file_or_nothing() {
    // A WRITE that comes early, in pieces of which the second begins outside of the window.
    let early = "00000000fb000000000000000000000000000000000000000000000000000000bee30039";
    let failed_in_flight = "000000008600bf000000008800910000004ebf00000000000000000000000000";
    let middle_of_the_old = "00008ac77b000000000000000000000000000000000000000000000000000000124f";
    check(
        properties::uploads,
        250,
        &[early, failed_in_flight, middle_of_the_old],
    );
}

#[test]
fn users_files_are_refused_or_valid() {
    check(properties::users, 150, &["695b000000bd"]);
}

/// Checks the old inputs, in hex, and `cases` new ones: those of the seed in SFTPD_TEST_SEED, which
/// a failure prints, if it is set.
fn check(property: fn(&[u8]), cases: usize, old: &[&str]) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = std::env::var("SFTPD_TEST_SEED")
        .map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    let mut random = StdRng::seed_from_u64(seed);
    let new = std::iter::repeat_with(|| {
        let most = 1 << random.random_range(5..12);
        let mut data = vec![0; random.random_range(0..most)];
        random.fill_bytes(&mut data);
        data
    });
    let mut all = old.iter().map(|hex| from_hex(hex)).chain(new.take(cases));
    let usual = take_hook();
    // Also the panics of tasks, which the runtime catches.
    set_hook(Box::new(|panic| {
        PANICS.lock().unwrap().push(panic.to_string())
    }));
    let failing = all.find(|data| !panics(property, data).is_empty());
    let found = failing
        .map(|data| smaller(property, data))
        .map(|data| (panics(property, &data), to_hex(&data)));
    set_hook(usual);
    if let Some((panics, hex)) = found {
        panic!("{}\nseed {seed}, input \"{hex}\"", panics.join("\n"));
    }
}

/// The panics that an input causes.
fn panics(property: fn(&[u8]), data: &[u8]) -> Vec<String> {
    let _ = catch_unwind(|| property(data));
    std::mem::take(&mut PANICS.lock().unwrap())
}

/// Makes a failing input smaller: removes ever smaller pieces, or sets them to 0, as long as it
/// still fails.
fn smaller(property: fn(&[u8]), mut data: Vec<u8>) -> Vec<u8> {
    let mut tries = 0..TRIES;
    let mut size = data.len().next_power_of_two();
    while size > 0 {
        let mut at = 0;
        while at < data.len() && tries.next().is_some() {
            let end = data.len().min(at + size);
            let (mut cut, mut flat) = (data.clone(), data.clone());
            cut.drain(at..end);
            flat[at..end].fill(0);
            match [cut, flat]
                .into_iter()
                .find(|less| *less != data && !panics(property, less).is_empty())
            {
                Some(less) if less.len() < data.len() => data = less,
                Some(less) => (data, at) = (less, end),
                None => at = end,
            }
        }
        size /= 2;
    }
    data
}

fn to_hex(data: &[u8]) -> String {
    data.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}
