//! Completions and the manual page, made from what clap knows of the command.

use anyhow::Context;
use clap_mangen::Man;
use std::io;

const NAME: &str = "sftpd";

/// The completion script for a shell.
pub fn completions(mut command: clap::Command, shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, NAME, &mut script);
    script
}

/// One page of roff for the command and all of its subcommands.
pub fn page(mut command: clap::Command) -> anyhow::Result<Vec<u8>> {
    command.build();
    write_page(&command).context("can't make the manual page")
}

fn write_page(command: &clap::Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let man = Man::new(command.clone());
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    for subcommand in command.get_subcommands() {
        write_subcommand(subcommand, &mut page)?;
    }
    man.render_extra_section(&mut page)?;
    Ok(page)
}

/// Writes a section for the subcommand, which contains the sections that its own page would have,
/// and then those of its subcommands.
fn write_subcommand(command: &clap::Command, page: &mut Vec<u8>) -> io::Result<()> {
    if command.get_name() == "help" {
        return Ok(());
    }
    let mut sections = Vec::new();
    let man = Man::new(command.clone());
    man.render_synopsis_section(&mut sections)?;
    man.render_description_section(&mut sections)?;
    man.render_options_section(&mut sections)?;
    let name = command.get_display_name().unwrap_or(command.get_name());
    let name = name.replace('-', " ");
    let sections = String::from_utf8_lossy(&sections).replace(".SH ", ".SS ");
    page.extend(format!(".SH {}\n{sections}", name.to_uppercase()).bytes());
    for subcommand in command.get_subcommands() {
        write_subcommand(subcommand, page)?;
    }
    Ok(())
}
