//! Makes a failing plan small: without clients, steps, files, faults and waiting times that are not
//! needed for it to break the same promise.

use super::checker::{Rule, check};
use super::history::{Event, History, What};
use super::plan::{Faults, Manner, Plan};
use super::remote::RequestName;
use super::run::run;

/// Plans that are tried at most.
const TRIES: usize = 6000;
/// Other fates of the requests that a smaller plan is tried with: less happens in it, so every
/// request is another one.
const OTHER_FATES: u64 = 20;

/// The smallest plan found, and its history.
pub fn shrink(plan: Plan, rule: Rule) -> (Plan, History) {
    let history = run(&plan).history;
    let mut shrinking = Shrinking {
        plan,
        history,
        rule,
        tries: 0,
    };
    loop {
        let before = shrinking.text();
        shrinking.drop_clients();
        shrinking.drop_steps();
        shrinking.drop_setup();
        shrinking.spare_requests();
        shrinking.simplify_steps();
        shrinking.simplify_surroundings();
        if shrinking.text() == before || shrinking.tries >= TRIES {
            return (shrinking.plan, shrinking.history);
        }
    }
}

struct Shrinking {
    plan: Plan,
    history: History,
    rule: Rule,
    tries: usize,
}

impl Shrinking {
    /// Changes with every success.
    fn text(&self) -> String {
        format!("{:?}", self.plan)
    }

    /// As [`Shrinking::try_plan`], with whatever fates its requests must have for it.
    fn try_plan_with_other_fates(&mut self, plan: Plan) {
        let first = plan.fate_seed;
        let mut fates = first..=first + OTHER_FATES;
        let _is_smaller = fates.any(|fate_seed| {
            self.try_plan(Plan {
                fate_seed,
                ..plan.clone()
            })
        });
    }

    /// Keeps a plan if it still breaks the promise.
    fn try_plan(&mut self, plan: Plan) -> bool {
        if self.tries >= TRIES || format!("{plan:?}") == self.text() {
            return false;
        }
        self.tries += 1;
        let history = run(&plan).history;
        let fails = check(&history)
            .iter()
            .any(|violation| violation.rule == self.rule);
        if fails {
            self.plan = plan;
            self.history = history;
        }
        fails
    }

    fn drop_clients(&mut self) {
        for number in (0..self.plan.clients.len()).rev() {
            let mut plan = self.plan.clone();
            plan.clients.remove(number);
            self.try_plan_with_other_fates(plan);
        }
    }

    fn drop_steps(&mut self) {
        for client in 0..self.plan.clients.len() {
            for step in (0..self.plan.clients[client].steps.len()).rev() {
                let mut plan = self.plan.clone();
                let dropped = plan.clients[client].steps.remove(step);
                // What follows begins when it did.
                if let Some(next) = plan.clients[client].steps.get_mut(step) {
                    let between = self
                        .beginning(next.id)
                        .saturating_sub(self.beginning(dropped.id));
                    next.pause = dropped.pause + between;
                }
                self.try_plan_with_other_fates(plan);
            }
        }
    }

    /// When a step began, in milliseconds.
    fn beginning(&self, step: usize) -> u64 {
        let is_it = |event: &&Event| matches!(event.what, What::Began { id, .. } if id == step);
        self.history
            .events
            .iter()
            .find(is_it)
            .map_or(0, |event| event.at)
    }

    fn drop_setup(&mut self) {
        for number in (0..self.plan.setup.len()).rev() {
            let mut plan = self.plan.clone();
            plan.setup.remove(number);
            self.try_plan_with_other_fates(plan);
        }
    }

    /// Faults, one at a time.
    fn spare_requests(&mut self) {
        if self.plan.faults == Faults::None {
            return;
        }
        let mut plan = self.plan.clone();
        plan.faults = Faults::None;
        if self.try_plan(plan) {
            return;
        }
        for name in self.faulty_requests() {
            let mut plan = self.plan.clone();
            plan.spared.insert(name);
            self.try_plan(plan);
        }
    }

    fn faulty_requests(&self) -> Vec<RequestName> {
        let mut names = Vec::new();
        for event in &self.history.events {
            if let What::Fault { request, .. } = &event.what {
                names.push(request.clone());
            }
        }
        names
    }

    fn simplify_steps(&mut self) {
        for client in 0..self.plan.clients.len() {
            for step in 0..self.plan.clients[client].steps.len() {
                let mut plan = self.plan.clone();
                plan.clients[client].steps[step].line_break = None;
                self.try_plan(plan);
                let mut plan = self.plan.clone();
                plan.clients[client].steps[step].manner = Manner::Waits;
                self.try_plan(plan);
                let mut plan = self.plan.clone();
                plan.clients[client].steps[step].slow = 0;
                self.try_plan(plan);
                let mut plan = self.plan.clone();
                plan.clients[client].steps[step].pause = 0;
                self.try_plan(plan);
            }
        }
    }

    fn simplify_surroundings(&mut self) {
        let mut plan = self.plan.clone();
        plan.gateways = 1;
        plan.clients
            .iter_mut()
            .for_each(|client| client.gateway = 0);
        self.try_plan(plan);
        let mut plan = self.plan.clone();
        plan.store.has_md5_etags = true;
        self.try_plan(plan);
    }
}
