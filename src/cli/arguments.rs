//! What clap's attributes can't do: ignore empty variables, name the variable that a wrong value
//! comes from, and list the settings that differ from their defaults.

use super::logging;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgMatches, CommandFactory, Error, FromArgMatches, builder::Resettable};
use std::env;

/// Parses the command line and the variables. Ends the process after a mistake, and for `--help`
/// and `--version`.
pub fn parse<C: CommandFactory + FromArgMatches>() -> (C, ArgMatches) {
    let mut command = ignore_empty_variables(C::command());
    let matches = match command.try_get_matches_from_mut(env::args_os()) {
        Ok(matches) => matches,
        Err(error) => exit_with(name_variables(error, &C::command())),
    };
    match C::from_arg_matches(&matches) {
        Ok(parsed) => (parsed, matches),
        Err(error) => exit_with(error.format(&mut command)),
    }
}

/// clap takes an empty variable for an empty value. In an EnvironmentFile it is a setting that was
/// left out.
fn ignore_empty_variables(command: clap::Command) -> clap::Command {
    let ignore = |arg: Arg| match arg.get_env().and_then(env::var_os) {
        Some(value) if value.is_empty() => arg.env(Resettable::Reset),
        _ => arg,
    };
    command
        .mut_args(ignore)
        .mut_subcommands(ignore_empty_variables)
}

/// Adds which variable a wrong value comes from, or which one can hold a missing value.
fn name_variables(mut error: Error, command: &clap::Command) -> Error {
    let mut tips = Vec::new();
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(wrong)) if !is_on_command_line(wrong) => {
            let variable = find_variable(command, flag_name(wrong));
            tips.extend(
                variable.map(|variable| format!("this value comes from the variable {variable}")),
            );
        }
        Some(ContextValue::Strings(missing)) => {
            let variables = missing
                .iter()
                .filter_map(|missing| find_variable(command, flag_name(missing)));
            tips.extend(variables.map(|variable| format!("the variable {variable} can hold it")));
        }
        _ => {}
    }
    if !tips.is_empty() {
        let tips = tips.into_iter().map(Into::into).collect();
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    }
    error
}

/// The name of the flag that clap shows as `--name <VALUE>`.
fn flag_name(shown: &str) -> &str {
    let flag = shown.split([' ', '=', '[']).next().unwrap_or(shown);
    flag.trim_start_matches('-')
}

/// Whether the value comes from the command line, and not from a variable.
fn is_on_command_line(shown: &str) -> bool {
    let flag = format!("--{}", flag_name(shown));
    env::args_os().any(|word| word.to_string_lossy().split('=').next() == Some(&flag))
}

fn find_variable(command: &clap::Command, flag: &str) -> Option<String> {
    let own = command
        .get_arguments()
        .find(|arg| arg.get_long() == Some(flag));
    match own.and_then(Arg::get_env) {
        Some(variable) => Some(variable.to_string_lossy().into_owned()),
        None => command
            .get_subcommands()
            .find_map(|subcommand| find_variable(subcommand, flag)),
    }
}

/// Prints the error as clap does, or line by line with priorities where systemd's journal reads it.
fn exit_with(error: Error) -> ! {
    if error.use_stderr() && logging::is_for_journal() {
        logging::print_error(&error.render().to_string());
        std::process::exit(error.exit_code());
    }
    error.exit()
}

/// The settings of a command that differ from their defaults, as flags, except those named in
/// `except`. Flags that hide the value of their variable are secrets and left out.
pub fn changed_settings(
    command: &clap::Command,
    matches: &ArgMatches,
    except: &[&str],
) -> Vec<String> {
    let mut changed = Vec::new();
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let is_setting = arg.get_env().is_some() && !arg.is_hide_env_values_set();
        if !is_setting || except.contains(&id) {
            continue;
        }
        let values: Vec<_> = matches.get_raw(id).into_iter().flatten().collect();
        if values != arg.get_default_values() {
            let flag = arg.get_long().unwrap_or_default();
            let shown: Vec<_> = values.iter().map(|value| value.to_string_lossy()).collect();
            changed.push(format!("--{flag}={}", shown.join(",")));
        }
    }
    changed
}
