//! The `sftpd` command: parses the command line, starts the log, runs, and sets the exit status.

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
    let log_format = command.log_format();
    logging::start(log_format);
    let status = match cli::run(command, &matches).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::report_error(&format!("sftpd: {error:#}"), log_format);
            find_status(&error)
        }
    };
    logging::finish();
    status
}

fn find_status(error: &anyhow::Error) -> ExitCode {
    if error.is::<Usage>() {
        // The operator must change something before another try.
        ExitCode::from(2)
    } else {
        ExitCode::FAILURE
    }
}
