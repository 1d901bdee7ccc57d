//! The `sftpd` command: parse, log, run, exit status.

mod cli;

use cli::{Command, Usage, arguments, logging};
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    if let Err(error) = cli::users::check_command_line(std::env::args_os()) {
        logging::print_error(&format!("sftpd: {error}"));
        return ExitCode::from(2);
    }
    let (command, matches) = arguments::parse::<Command>();
    logging::start();
    let Err(error) = cli::run(command, &matches).await else {
        return ExitCode::SUCCESS;
    };
    logging::print_error(&format!("sftpd: {error:#}"));
    // 2 says that the operator has to change something before another try.
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}
