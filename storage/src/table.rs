//! Small named values beside the journal: the state that a restarted supervisor needs.

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::journal::Store;
use crate::record::{self, Place};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A table of named values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Facts about the run: its placement, its members, its state.
    Facts,
    /// Access tokens.
    Tokens,
    /// Issued certificates.
    Certificates,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Self::Facts => "facts",
            Self::Tokens => "tokens",
            Self::Certificates => "certificates",
        }
    }
}

impl Store {
    /// Writes a value durably, replacing an existing one.
    ///
    /// # Errors
    /// [`Error::Unstorable`], [`Error::NoSpace`], [`Error::Database`] or [`Error::Io`].
    pub fn put<T: Serialize>(&self, table: Table, name: &str, value: &T) -> Result<()> {
        let bytes = record::seal(place(table, name), value)?;
        self.tree(table).insert(name, bytes).map_err(|e| self.failed("write a value", e))?;
        self.make_durable()
    }

    /// The value of a name.
    ///
    /// # Errors
    /// [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn get<T: DeserializeOwned>(&self, table: Table, name: &str) -> Result<Option<T>> {
        self.read(self.tree(table), table.name(), name.as_bytes())
    }

    /// Compare-and-swap: replaces a value durably if it is `from` (`None`: absent), and returns whether it
    /// was. Of several callers that use up an access token, exactly one gets `true`.
    ///
    /// # Errors
    /// As [`Store::put`].
    pub fn swap<T: Serialize>(
        &self,
        table: Table,
        name: &str,
        from: Option<&T>,
        to: Option<&T>,
    ) -> Result<bool> {
        let seal = |value: Option<&T>| value.map(|v| record::seal(place(table, name), v)).transpose();
        let (from, to) = (seal(from)?, seal(to)?);
        let swapped = self
            .tree(table)
            .compare_and_swap(name, from, to)
            .map_err(|e| self.failed("replace a value", e))?
            .is_ok();
        self.make_durable()?;
        Ok(swapped)
    }

    /// Removes a value durably; returns whether it existed.
    ///
    /// # Errors
    /// [`Error::Database`] or [`Error::Io`].
    pub fn remove(&self, table: Table, name: &str) -> Result<bool> {
        let removed = self.tree(table).remove(name).map_err(|e| self.failed("remove a value", e))?;
        self.make_durable()?;
        Ok(removed.is_some())
    }

    /// All values of a table, by name.
    ///
    /// # Errors
    /// [`Error::Database`] or [`Error::DamagedRecord`].
    pub fn list<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>> {
        let mut values = Vec::new();
        for item in self.tree(table) {
            let (key, bytes) = item.map_err(|e| self.failed("read a table", e))?;
            let value = record::open(Place { tree: table.name(), key: &key }, &bytes)?;
            values.push((String::from_utf8_lossy(&key).into_owned(), value));
        }
        Ok(values)
    }

    /// The names of a table's values, in order.
    ///
    /// # Errors
    /// [`Error::Database`].
    pub fn names(&self, table: Table) -> Result<Vec<String>> {
        let keys = self.tree(table).iter().keys();
        keys.map(|key| {
            let key = key.map_err(|e| self.failed("read a table", e))?;
            Ok(String::from_utf8_lossy(&key).into_owned())
        })
        .collect()
    }

    fn tree(&self, table: Table) -> &sled::Tree {
        match table {
            Table::Facts => &self.facts,
            Table::Tokens => &self.tokens,
            Table::Certificates => &self.certificates,
        }
    }
}

/// The place of a fact.
pub(crate) fn fact(name: &str) -> Place<'_> {
    place(Table::Facts, name)
}

fn place(table: Table, name: &str) -> Place<'_> {
    Place { tree: table.name(), key: name.as_bytes() }
}
