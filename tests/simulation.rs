//! A simulation that finds races between clients, deterministic from a seed: sessions of several
//! users on one gateway or two, over a store that is slow, fails, loses answers and repeats
//! requests, in virtual time and on one thread. `simulation/checker.rs` says which promises every
//! history must keep.
//!
//! `SFTPD_SIMULATION_HISTORIES=100000 cargo test --test simulation` plays more histories,
//! `SFTPD_SIMULATION_SEED=123 cargo test --test simulation` the one of a seed, and both together
//! that many from that seed on.

// A panic is how a test fails.
#![allow(clippy::restriction)]

#[path = "simulation/mod.rs"]
mod simulation;

use simulation::checker::{Rule, check};
use simulation::history::{Fault, History};
use simulation::plan::Plan;
use simulation::run::run;
use simulation::shrink::shrink;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::ops::Range;
use std::time::Instant;

/// Histories of one `cargo test`: as many as take about half a minute.
const HISTORIES: u64 = 8000;
/// Seeds that are printed for each broken promise.
const SEEDS_SHOWN: usize = 10;
/// Histories that are played twice.
const REPEATED: u64 = 200;

/// What was played, for the line that is printed at the end.
#[derive(Default)]
struct Figures {
    histories: usize,
    operations: usize,
    delays: usize,
    failures: usize,
    lost_answers: usize,
    duplicates: usize,
    empty_promises: usize,
    violations: usize,
}

impl Figures {
    fn add(&mut self, plan: &Plan, history: &History, delayed: usize) {
        self.histories += 1;
        self.operations += plan.steps();
        self.delays += delayed;
        self.failures += history.count_faults(&[Fault::Failure, Fault::UnclearFailure]);
        self.lost_answers += history.count_faults(&[Fault::LostAnswer, Fault::LateEffect]);
        self.duplicates += history.count_faults(&[Fault::Repeated, Fault::LateDuplicate]);
        self.empty_promises += history.count_faults(&[Fault::EmptyPromise]);
    }

    fn line(&self, seconds: f64) -> String {
        let Figures {
            histories,
            operations,
            delays,
            failures,
            lost_answers,
            duplicates,
            empty_promises,
            violations,
        } = self;
        format!(
            "simulation: {histories} histories, {operations} operations, {seconds:.1} s, faults: delays {delays}, \
             failures {failures}, lost answers {lost_answers}, duplicates {duplicates}, copies confirmed and not made \
             {empty_promises}; {violations} violations"
        )
    }
}

#[test]
fn every_history_keeps_every_promise() {
    let began = Instant::now();
    let mut figures = Figures::default();
    // The seeds that break each promise.
    let mut broken: BTreeMap<Rule, Vec<u64>> = BTreeMap::new();
    for seed in seeds() {
        let plan = Plan::draw(seed);
        let outcome = run(&plan);
        figures.add(&plan, &outcome.history, outcome.delayed);
        let violations = check(&outcome.history);
        figures.violations += violations.len();
        for violation in violations {
            let seeds = broken.entry(violation.rule).or_default();
            if seeds.last() != Some(&seed) {
                seeds.push(seed);
            }
        }
    }
    // Not `eprintln`, whose output the test harness hides when the test passes.
    let _closed = writeln!(
        std::io::stderr(),
        "{}",
        figures.line(began.elapsed().as_secs_f64())
    );
    assert!(broken.is_empty(), "{}", explain(&broken));
}

#[test]
fn a_seed_always_gives_the_same_history() {
    for seed in 1..=REPEATED {
        let plan = Plan::draw(seed);
        let first = run(&plan).history;
        let second = run(&plan).history;
        assert!(first == second, "seed {seed}\n{first}\nbut then\n{second}");
    }
}

fn seeds() -> Range<u64> {
    let first = number_from("SFTPD_SIMULATION_SEED");
    let count = number_from("SFTPD_SIMULATION_HISTORIES");
    match (first, count) {
        (None, count) => 1..1 + count.unwrap_or(HISTORIES),
        (Some(first), count) => first..first + count.unwrap_or(1),
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect("a number"))
}

/// The first history that breaks each promise, made small.
fn explain(broken: &BTreeMap<Rule, Vec<u64>>) -> String {
    let mut text = String::new();
    for (rule, seeds) in broken {
        let seed = seeds[0];
        let (plan, history) = shrink(Plan::draw(seed), *rule);
        let (count, first) = (seeds.len(), &seeds[..seeds.len().min(SEEDS_SHOWN)]);
        let _infallible = writeln!(
            text,
            "\n{rule:?} is broken by {count} histories, with the seeds {first:?}…:"
        );
        let _infallible = writeln!(
            text,
            "  SFTPD_SIMULATION_SEED={seed} cargo test --test simulation"
        );
        let conditions = if plan.store.keeps_conditions {
            "keeps conditions"
        } else {
            "ignores conditions"
        };
        let _infallible = writeln!(
            text,
            "{} gateways, a store that {conditions}; made small it is:",
            plan.gateways
        );
        let _infallible = write!(text, "{history}");
        for violation in check(&history) {
            let _infallible = writeln!(text, "  {violation}");
        }
    }
    text
}
