//! Where imported rows come from.

use async_trait::async_trait;

use super::json_lines;
use super::{Error, Location, Row};
use crate::domain::LastIds;
use crate::store::django::DjangoDatabase;

/// Rows read at once.
const PAGE: usize = 512;

/// Users, then prompts, each by rising id. Read twice: first to check, then to import.
#[async_trait]
pub trait Source: Send {
    /// The highest ids ever given out there, as far as known: the ids of deleted rows must not be
    /// given to other rows here.
    fn last_ids(&self) -> LastIds;

    /// Goes back to the first row.
    async fn rewind(&mut self) -> Result<(), Error>;

    /// Some further rows; none at the end.
    async fn read(&mut self) -> Result<Vec<Row>, Error>;
}

#[async_trait]
impl Source for DjangoDatabase {
    fn last_ids(&self) -> LastIds {
        self.last_ids()
    }

    async fn rewind(&mut self) -> Result<(), Error> {
        self.rewind();
        Ok(())
    }

    async fn read(&mut self) -> Result<Vec<Row>, Error> {
        let records = self.read(PAGE).await?;
        let rows = records.into_iter().filter_map(|record| {
            Some(Row {
                location: Location::of(&record)?,
                record: Ok(record),
            })
        });
        Ok(rows.collect())
    }
}

#[async_trait]
impl Source for json_lines::Reader {
    fn last_ids(&self) -> LastIds {
        self.last_ids()
    }

    async fn rewind(&mut self) -> Result<(), Error> {
        Ok(self.rewind()?)
    }

    async fn read(&mut self) -> Result<Vec<Row>, Error> {
        let mut rows = Vec::with_capacity(PAGE);
        while rows.len() < PAGE
            && let Some(row) = self.read_row()?
        {
            rows.push(row);
        }
        Ok(rows)
    }
}
