//! The parts of the simulation. `adaptor` alone names the library; `checker` knows nothing but the
//! history.
//!
//! A [`plan::Plan`] is drawn from a seed, [`run::run`] turns it into a [`history::History`],
//! [`checker::check`] finds broken promises in that, and [`shrink::shrink`] makes a failing plan
//! small.

// A panic is how a test fails.
#![allow(clippy::restriction)]

pub mod adaptor;
pub mod bucket;
pub mod checker;
mod checker_tests;
mod client;
#[path = "../support/dice.rs"]
mod dice;
pub mod history;
mod line;
pub mod plan;
pub mod remote;
pub mod run;
mod session_rules;
pub mod shrink;
