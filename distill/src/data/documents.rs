//! Documents from a jsonl file: one JSON object a line, with `text` or with chat `messages`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::files::hexadecimal;

/// What a document says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Plain text; all of it is learned.
    Text(String),
    /// A chat; what the assistant says is learned. Objects with `role`, `content` and whatever else the chat template
    /// reads.
    Messages(Vec<Value>),
}

/// One document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Line in the file, counted from 1.
    pub line: usize,
    /// The line's `id`, if it has one.
    pub id: Option<String>,
    /// What it says.
    pub content: Content,
}

/// A jsonl file being read. Blank lines are skipped; keys other than `text`, `messages` and `id` are ignored. Every
/// error names the file and the line.
pub struct Documents {
    path: PathBuf,
    reader: BufReader<File>,
    hasher: Sha256,
    line: usize,
    bytes: Vec<u8>,
}

impl Documents {
    /// Opens a file.
    ///
    /// # Errors
    /// No such file, or one that may not be read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening the data file {}", path.display()))?;
        let reader = BufReader::with_capacity(1 << 20, file);
        Ok(Self { path: path.to_owned(), reader, hasher: Sha256::new(), line: 0, bytes: Vec::new() })
    }

    /// The SHA-256 of what was read; the file's when all documents were taken.
    pub fn hash(&self) -> String {
        hexadecimal(&self.hasher.clone().finalize())
    }

    /// A document's place, for messages: file, line and id.
    pub fn place(&self, document: &Document) -> String {
        let id = document.id.as_ref().map(|id| format!(" (id {id})")).unwrap_or_default();
        format!("{} line {}{id}", self.path.display(), document.line)
    }

    fn read(&mut self) -> Result<Option<Document>> {
        loop {
            self.bytes.clear();
            self.line += 1;
            let line = self.line;
            let place = || format!("{} line {line}", self.path.display());
            if self.reader.read_until(b'\n', &mut self.bytes).with_context(place)? == 0 {
                return Ok(None);
            }
            self.hasher.update(&self.bytes);
            let text = match std::str::from_utf8(&self.bytes) {
                Ok(text) => text.trim(),
                Err(error) => bail!(
                    "{}: not UTF-8 at byte {} of the line: convert the file to UTF-8",
                    place(),
                    error.valid_up_to() + 1
                ),
            };
            // Some editors put a byte-order mark before the first line.
            let text = if line == 1 { text.trim_start_matches('\u{feff}') } else { text };
            if !text.is_empty() {
                return parse(text, line).with_context(place).map(Some);
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

#[derive(Deserialize)]
struct Line {
    id: Option<Value>,
    text: Option<String>,
    messages: Option<Vec<Value>>,
}

fn parse(text: &str, line: usize) -> Result<Document> {
    let parsed: Line = match serde_json::from_str(text) {
        Ok(parsed) => parsed,
        Err(error) => bail!(
            "not a document: {error}. A line is a JSON object with \"text\" (a string) or \"messages\" (a list of \
             {{\"role\", \"content\"}})"
        ),
    };
    let content = match (parsed.text, parsed.messages) {
        (Some(text), None) => Content::Text(text),
        (None, Some(messages)) => {
            for (index, message) in messages.iter().enumerate() {
                check_message(message).with_context(|| format!("message {}", index + 1))?;
            }
            Content::Messages(messages)
        }
        (None, None) => bail!("neither \"text\" nor \"messages\" is there"),
        (Some(_), Some(_)) => bail!("both \"text\" and \"messages\" are there: keep the one that is meant"),
    };
    let id = parsed.id.map(|id| match id {
        Value::String(id) => id,
        other => other.to_string(),
    });
    Ok(Document { line, id, content })
}

/// A template would render what is missing as nothing, and nothing would be learned.
fn check_message(message: &Value) -> Result<()> {
    const FORM: &str = "each message is an object with \"role\" and \"content\"";
    ensure!(message.get("role").is_some_and(Value::is_string), "it has no \"role\": {FORM}");
    match message.get("content").unwrap_or(&Value::Null) {
        // Templates of some models take a list of parts.
        Value::String(_) | Value::Array(_) => Ok(()),
        // A message that only calls tools has nothing to say.
        Value::Null if message.get("tool_calls").is_some_and(Value::is_array) => Ok(()),
        Value::Null => bail!("it has no \"content\": {FORM}"),
        _ => bail!("its \"content\" is not a string: {FORM}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::hash_bytes;

    fn read(bytes: &[u8]) -> Result<Vec<Document>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, bytes).unwrap();
        Documents::open(&path)?.collect()
    }

    fn message(bytes: &[u8]) -> String {
        format!("{:#}", read(bytes).unwrap_err())
    }

    #[test]
    fn texts_and_chats_are_read_and_other_keys_ignored() {
        let lines = "\u{feff}{\"id\": 7, \"text\": \"one\", \"source\": {\"a\": 1}}\r\n\n  \
                     {\"messages\": [{\"role\": \"user\", \"content\": \"hé\", \"weight\": 0}]}";
        let documents = read(lines.as_bytes()).unwrap();
        assert_eq!(documents.len(), 2);
        assert_eq!(documents[0], Document { line: 1, id: Some("7".into()), content: Content::Text("one".into()) });
        let turn = serde_json::json!({"role": "user", "content": "hé", "weight": 0});
        assert_eq!(documents[1], Document { line: 3, id: None, content: Content::Messages(vec![turn]) });
    }

    #[test]
    fn the_hash_is_the_file_s() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        let bytes = b"{\"text\": \"a\"}\n\n{\"text\": \"b\"}";
        std::fs::write(&path, bytes).unwrap();
        let mut documents = Documents::open(&path).unwrap();
        assert_eq!(documents.by_ref().count(), 2);
        assert_eq!(documents.hash(), hash_bytes(bytes));
    }

    #[test]
    fn what_is_wrong_is_named_with_file_and_line() {
        let bad_utf8 = message(b"{\"text\": \"good\"}\n{\"text\": \"bad \xff\"}\n");
        assert!(bad_utf8.contains("data.jsonl line 2: not UTF-8 at byte 15"), "{bad_utf8}");
        let broken = message(b"\n{\"text\": \"good\"}\n{\"text\": \"cut o");
        assert!(broken.contains("data.jsonl line 3: not a document: EOF while parsing a string"), "{broken}");
        let other = message(b"{\"prompt\": \"x\"}");
        assert!(other.contains("line 1: neither \"text\" nor \"messages\" is there"), "{other}");
        let number = message(b"{\"text\": 4}");
        assert!(number.contains("line 1: not a document: invalid type: integer `4`, expected a string"), "{number}");
        let nameless = message(b"{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}, {\"content\": \"y\"}]}");
        assert!(nameless.contains("data.jsonl line 1: message 2: it has no \"role\""), "{nameless}");
        let chat = |message: &str| format!("{{\"text\": \"x\"}}\n{{\"messages\": [{message}]}}");
        for (wrong, expected) in [
            ("{\"role\": \"user\"}", "it has no \"content\": each message is an object with"),
            ("{\"role\": \"user\", \"content\": null}", "it has no \"content\""),
            ("{\"role\": \"user\", \"content\": 7}", "its \"content\" is not a string"),
            ("\"hello\"", "it has no \"role\""),
        ] {
            let said = self::message(chat(wrong).as_bytes());
            assert!(said.contains(&format!("data.jsonl line 2: message 1: {expected}")), "{said}");
        }
        for right in [
            "{\"role\": \"assistant\", \"content\": null, \"tool_calls\": []}",
            "{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"x\"}]}",
        ] {
            assert_eq!(read(chat(right).as_bytes()).unwrap().len(), 2);
        }
        let both = message(b"{\"text\": \"x\", \"messages\": []}");
        assert!(both.contains("both \"text\" and \"messages\" are there"), "{both}");
        let missing = format!("{:#}", Documents::open(Path::new("/no/such.jsonl")).err().unwrap());
        assert!(missing.contains("/no/such.jsonl") && missing.contains("No such file"), "{missing}");
    }
}
