//! Results on standard output, notes on standard error.
//!
//! Commands return a failed write as an error, so that `main` decides: a reader that closed the pipe, as
//! `head` does, ends the command quietly.

use std::fmt::{self, Display};
use std::io::{self, Write};

/// A failed write to standard output.
#[derive(Debug)]
pub struct Error(io::Error);

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot write to standard output")
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// Writes a value to standard output as it is.
///
/// # Errors
/// When the write fails.
pub fn text(value: impl Display) -> Result<(), Error> {
    write(&mut io::stdout().lock(), &value).map_err(Error)
}

/// Writes a value and a line end to standard output.
///
/// # Errors
/// When the write fails.
pub fn line(value: impl Display) -> Result<(), Error> {
    text(format_args!("{value}\n"))
}

fn write(to: &mut impl Write, value: &impl Display) -> io::Result<()> {
    write!(to, "{value}")?;
    to.flush()
}

/// Writes a line to standard error. Its failure is ignored: a run continues when its terminal is closed.
pub fn note(value: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{value}");
}

/// Whether a command failed only because the reader of its standard output closed the pipe.
#[must_use]
pub fn is_closed_by_reader(error: &anyhow::Error) -> bool {
    let written = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
    written.is_some_and(|Error(error)| error.kind() == io::ErrorKind::BrokenPipe)
}

/// An error and its causes in one line. Some errors tell their cause themselves: it is told once.
#[must_use]
pub fn with_causes(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |told, cause| {
        let cause = cause.to_string();
        match told.as_str() {
            "" => cause,
            told if told.contains(&cause) => told.to_owned(),
            told => format!("{told}: {cause}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_closed_pipe_of_standard_output_is_no_failure() {
        let error = |kind: io::ErrorKind| anyhow::Error::new(Error(kind.into())).context("a command");
        assert!(is_closed_by_reader(&error(io::ErrorKind::BrokenPipe)));
        assert!(!is_closed_by_reader(&error(io::ErrorKind::StorageFull)));
        let elsewhere = anyhow::Error::new(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(!is_closed_by_reader(&elsewhere), "a pipe to a child process");
    }

    #[test]
    fn a_cause_that_an_error_tells_itself_is_told_once() {
        let cause = io::Error::from_raw_os_error(2);
        let read = volary_data::Error::Read { path: "a.txt".into(), error: cause };
        let told = with_causes(&anyhow::Error::new(read).context("source a"));
        assert_eq!(told.matches("(os error 2)").count(), 1, "{told}");
        assert!(told.starts_with("source a: cannot read a.txt: "), "{told}");
        let silent = anyhow::anyhow!("no space").context("cannot write");
        assert_eq!(with_causes(&silent), "cannot write: no space");
    }

    #[test]
    fn a_failed_write_is_one_line_with_its_cause() {
        let error = anyhow::Error::new(Error(io::Error::other("disk full")));
        assert_eq!(format!("{error:#}"), "cannot write to standard output: disk full");
    }
}
