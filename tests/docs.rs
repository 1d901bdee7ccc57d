//! The pages for people: every relative link leads to a file, and its anchor to a heading there;
//! the table of settings is that of `--help`; README.md fits on a few screens.

// A panic is how a test fails.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Most lines of README.md.
const MAX_README_LINES: usize = 170;
/// Longest line of README.md, in characters.
const MAX_README_WIDTH: usize = 120;

/// A link of a page.
struct Link {
    /// Line number, from 1.
    line: usize,
    target: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
        .iter()
        .map(|name| root().join(name))
        .collect();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    pages
}

/// The lines outside fenced blocks of code, with their numbers.
fn lines_of_prose(text: &str) -> Vec<(usize, &str)> {
    let mut is_code = false;
    let mut prose = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            prose.push((index + 1, line));
        }
    }
    prose
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut anchors = BTreeSet::new();
    for (_, line) in lines_of_prose(text) {
        let heading = line.trim_start_matches('#');
        let level = line.len() - heading.len();
        if !(1..=6).contains(&level) || !heading.starts_with(' ') {
            continue;
        }
        let slug = slug(heading.trim());
        let count = counts.entry(slug.clone()).or_default();
        // A second heading of the same words gets a number.
        let anchor = match *count {
            0 => slug,
            earlier => format!("{slug}-{earlier}"),
        };
        *count += 1;
        anchors.insert(anchor);
    }
    anchors
}

/// Lower case; spaces become hyphens; punctuation goes.
fn slug(heading: &str) -> String {
    let mut slug = String::new();
    for character in heading.to_lowercase().chars() {
        match character {
            ' ' => slug.push('-'),
            '-' | '_' => slug.push(character),
            _ if character.is_alphanumeric() => slug.push(character),
            _ => {}
        }
    }
    slug
}

/// The line with spaces in place of its `code`.
fn without_code(line: &str) -> String {
    let mut is_code = false;
    let mut prose = String::new();
    for character in line.chars() {
        if character == '`' {
            is_code = !is_code;
        }
        prose.push(if is_code { ' ' } else { character });
    }
    prose
}

/// What lies between the marks, as often as they occur.
fn between<'a>(line: &'a str, start: &str, end: char) -> Vec<&'a str> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some((_, after)) = rest.split_once(start) {
        let Some((inside, behind)) = after.split_once(end) else {
            break;
        };
        found.push(inside);
        rest = behind;
    }
    found
}

/// `[text](target)`, `[label]: target`, and the images of `<img src="target">` and `<source
/// srcset="target">`.
fn links(text: &str) -> Vec<Link> {
    let prose = lines_of_prose(text);
    let mut links = Vec::new();
    for (index, (line, raw)) in prose.iter().enumerate() {
        let clean = without_code(raw);
        let mut targets = between(&clean, "](", ')');
        targets.extend(between(&clean, "src=\"", '"'));
        targets.extend(between(&clean, "srcset=\"", '"'));
        if let Some((_, target)) = definition(&clean) {
            // A long target may stand in the next line.
            let next = prose.get(index + 1).map_or("", |(_, next)| next.trim());
            targets.push(if target.is_empty() { next } else { target });
        }
        for target in targets {
            links.push(Link {
                line: *line,
                target: target.to_owned(),
            });
        }
    }
    links
}

/// The label and the target of a line like `[label]: target`.
fn definition(line: &str) -> Option<(&str, &str)> {
    let (label, target) = line.strip_prefix('[')?.split_once("]:")?;
    Some((label, target.trim()))
}

/// What is wrong with the links of a page, one sentence each.
fn broken_links(page: &Path) -> Vec<String> {
    let text = fs::read_to_string(page).unwrap();
    let mut broken = Vec::new();
    for Link { line, target } in links(&text) {
        if let Some(why) = fault(page, &target) {
            broken.push(format!("{}:{line}: {target}: {why}", page.display()));
        }
    }
    let labels: BTreeSet<&str> = text
        .lines()
        .filter_map(definition)
        .map(|(label, _)| label)
        .collect();
    for (line, raw) in lines_of_prose(&text) {
        for label in between(&without_code(raw), "][", ']') {
            if !labels.contains(label) {
                broken.push(format!(
                    "{}:{line}: [{label}] is not defined",
                    page.display()
                ));
            }
        }
    }
    broken
}

/// Why a target can't be followed. `None` if it can, or is an address on the web.
fn fault(page: &Path, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = match target.split_once('#') {
        Some((file, anchor)) => (file, Some(anchor)),
        None => (target, None),
    };
    let path = match file {
        "" => page.to_owned(),
        file => page.parent().unwrap().join(file),
    };
    if !path.exists() {
        return Some("there is no such file".to_owned());
    }
    let anchor = anchor?;
    let Ok(text) = fs::read_to_string(&path) else {
        return Some("an anchor needs a page".to_owned());
    };
    if anchors(&text).contains(anchor) {
        None
    } else {
        Some("there is no such heading".to_owned())
    }
}

#[test]
fn every_relative_link_leads_to_a_file_and_a_heading() {
    let mut count = 0;
    let mut broken = Vec::new();
    for page in pages() {
        count += links(&fs::read_to_string(&page).unwrap()).len();
        broken.extend(broken_links(&page));
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(count > 50, "{count} links were found");
}

/// A setting of `sftpd serve`.
#[derive(Debug, Default, PartialEq)]
struct Setting {
    flag: String,
    variable: String,
    /// `None` if there is none, or if it depends on the machine.
    default: Option<String>,
}

fn settings_of_help(help: &str) -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    for line in help.lines().map(str::trim) {
        if let Some(flag) = line.strip_prefix("--") {
            let name = flag.split([' ', '[', '=']).next().unwrap();
            settings.push(Setting {
                flag: format!("--{name}"),
                ..Setting::default()
            });
        }
        let Some(setting) = settings.last_mut() else {
            continue;
        };
        if let Some(variable) = line.strip_prefix("[env: ") {
            setting.variable = variable.trim_end_matches("=]").to_owned();
        }
        if let Some(default) = line.strip_prefix("[default: ") {
            setting.default = Some(default.trim_end_matches(']').to_owned());
        }
    }
    settings
}

fn settings_of_page(page: &str) -> Vec<Setting> {
    let mut settings = Vec::new();
    for row in page.lines().filter(|line| line.starts_with("| `--")) {
        let mut cells = row.split('|').map(|cell| cell.trim().replace('`', ""));
        let _before_the_first = cells.next();
        let flag = cells.next().unwrap();
        let variable = cells.next().unwrap();
        let default = match cells.next().unwrap().as_str() {
            "" | "none" | "as memory allows" => None,
            default => Some(default.to_owned()),
        };
        settings.push(Setting {
            flag,
            variable,
            default,
        });
    }
    settings
}

#[test]
fn table_of_settings_is_that_of_help() {
    let mut serve = Command::new(env!("CARGO_BIN_EXE_sftpd"));
    let output = serve
        .args(["serve", "--help"])
        .env_clear()
        .output()
        .unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let page = fs::read_to_string(root().join("docs/operate.md")).unwrap();
    let expected = settings_of_help(&help);
    let documented = settings_of_page(&page);
    assert!(expected.len() > 10, "{help}");
    for setting in &expected {
        assert!(
            documented.contains(setting),
            "{setting:?} is not in docs/operate.md"
        );
    }
    for setting in &documented {
        assert!(expected.contains(setting), "sftpd serve has no {setting:?}");
    }
}

#[test]
fn readme_fits_on_a_few_screens() {
    let text = fs::read_to_string(root().join("README.md")).unwrap();
    let lines = text.lines().count();
    assert!(lines <= MAX_README_LINES, "README.md has {lines} lines");
    for (index, line) in text.lines().enumerate() {
        let width = line.chars().count();
        let number = index + 1;
        assert!(
            width <= MAX_README_WIDTH,
            "README.md:{number} has {width} characters"
        );
    }
}

#[test]
fn broken_links_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.md");
    let text = "# A page: `code`, words\n## Twice\n## Twice\n\
        [1](#a-page-code-words) [2](page.md#twice-1) [3](https://example.com/none) [4][label] `[5](none)`\n\
        ```\n[6](none)\n# no-heading\n```\n\
        [7](none.md) [8](#none) [9](page.md#no-heading) [10][nothing] <img src=\"none.svg\">\n\n\
        [label]: page.md\n[other]:\nnone.txt\n";
    fs::write(&page, text).unwrap();
    let broken: Vec<String> = broken_links(&page)
        .iter()
        .map(|sentence| sentence.rsplit_once("page.md:").unwrap().1.to_owned())
        .collect();
    let expected = [
        "9: none.md: there is no such file",
        "9: #none: there is no such heading",
        "9: page.md#no-heading: there is no such heading",
        "9: none.svg: there is no such file",
        "12: none.txt: there is no such file",
        "9: [nothing] is not defined",
    ];
    for sentence in expected {
        assert!(
            broken.iter().any(|found| found == sentence),
            "{sentence} is not in {broken:#?}"
        );
    }
    assert_eq!(broken.len(), expected.len(), "{broken:#?}");
}
