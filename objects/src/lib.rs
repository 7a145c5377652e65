//! Folders of files where users keep them: `s3://`, `gs://`, `az://`, `file://`, and to read `http(s)://`.
//!
//! Credentials and endpoints come from the environment, by the names that the stores' own tools use
//! (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`
//! and so on). Requests that fail for a reason that may pass are repeated, within bounds.
//!
//! | module | content |
//! | --- | --- |
//! | [`location`] | an address, and the store behind it |
//! | [`folder`] | files in a store |
//! | [`limits`] | every bound |
//! | [`error`] | every error |

pub mod error;
pub mod folder;
pub mod limits;
pub mod location;

pub use error::{Error, Result};
pub use folder::{ObjectFolder, ObjectInfo};
pub use location::Location;
