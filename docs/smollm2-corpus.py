"""Makes a corpus of free English text from Debian packages: jsonl, a document a line, {"id", "text"}.

Usage: python3 docs/smollm2-corpus.py FOLDER [--mirror URL] [--megabytes N] [--exclude FILE]

Fetches the packages below (Debian 12, main: all under free licences, see each package's copyright file) from a Debian
mirror, takes paragraphs of prose out of their HTML, text, reStructuredText and POD files, drops paragraphs seen before, and
writes FOLDER/train.jsonl, FOLDER/valid.jsonl (one document in a hundred, by the hash of its name) and FOLDER/sources.tsv
(package, version, documents, bytes). Needs Python 3.9 and `dpkg-deb`.
"""
import argparse, gzip, hashlib, html, html.parser, json, lzma, pathlib, re, subprocess, tempfile, urllib.request

# Prose first: where N is reached, later packages are left out.
PACKAGES = """
anarchism r-cran-janeaustenr bible-kjv-text jargon-text debian-handbook developers-reference debian-policy
installation-guide-amd64 apt-doc maint-guide debian-faq debian-kernel-handbook gnome-user-docs linux-doc-6.1
python3.11-doc perl-doc git-doc postgresql-doc-15 rust-doc cmake-doc llvm-14-doc clang-14-doc ghc-doc ocaml-book-en
emacs-el vim-doc zsh-doc gawk-doc mercurial-common subversion sqlite3-doc mariadb-server gnuplot-doc octave-doc
r-doc-html maxima-doc pari-doc gap-doc libreoffice-help-en-us bind9-doc apache2-doc nginx-doc samba-doc ntp-doc
exim4-doc-html postfix-doc squid-common openjdk-17-doc libboost1.81-doc libgtk-3-doc libglib2.0-doc qtbase5-doc-html
python-django-doc python-numpy-doc python-scipy-doc python-sklearn-doc python-pandas-doc python-matplotlib-doc
python-sqlalchemy-doc python-sympy-doc python-networkx-doc python3-doc ruby3.1-doc racket-doc sbcl-doc guile-3.0-doc
erlang-doc golang-doc nodejs-doc tcl8.6-doc scala-doc swi-prolog-doc freepascal-doc fp-docs-3.2.2 ada-reference-manual-2012
dict-gcide dict-foldoc wordnet-base manpages manpages-dev coreutils manpages-posix
""".split()
PROSE = re.compile(r"[a-z]{2,}")
ENGLISH = set("the of to and is in that for it as be with this are on".split())
GRAM = 10


class Paragraphs(html.parser.HTMLParser):
    """Paragraphs of a page's text: what stands between block elements; code, navigation and tables are left out."""
    BLOCKS = set("p div li dd dt h1 h2 h3 h4 h5 h6 blockquote section article body br td".split())
    HIDDEN = set("script style nav header footer pre table select button title".split())

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.hidden, self.parts, self.done = 0, [], []

    def end(self):
        text = " ".join("".join(self.parts).split())
        self.parts = []
        if text:
            self.done.append(text)

    def handle_starttag(self, tag, attrs):
        if tag in self.HIDDEN:
            self.hidden += 1
        if tag in self.BLOCKS:
            self.end()

    def handle_endtag(self, tag):
        if tag in self.HIDDEN and self.hidden:
            self.hidden -= 1
        if tag in self.BLOCKS:
            self.end()

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def paragraphs(name, raw):
    text = raw.decode("utf-8", "replace")
    if re.search(r"\.x?html?$", name):
        parser = Paragraphs()
        parser.feed(text)
        parser.end()
        return parser.done
    if name.endswith(".pod"):
        text = re.sub(r"[A-Z]<+\s*([^<>]*?)\s*>+", r"\1", text)
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if not block.startswith((" " * 4, "\t", ".. ", "=begin"))]
    return [re.sub(r"[`*]{1,2}([^`*]+)[`*]{1,2}", r"\1", block) for block in blocks]


def is_prose(text):
    """Sentences: long enough, mostly letters and blanks, with the marks of a sentence."""
    if len(text) < 80 or not text[-1] in ".!?:;\"')" or "\ufffd" in text:
        return False
    words = text.lower().split()
    if sum(word in ENGLISH for word in words) < len(words) / 8:
        return False
    letters = sum(c.isalpha() or c == " " for c in text) / len(text)
    return letters > 0.85 and len(PROSE.findall(text)) > 10 and ". " in text + " "


def grams(text):
    """What two texts that share a passage have in common: runs of words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[at:at + GRAM])) for at in range(len(words) - GRAM + 1)}


def packages(mirror):
    """Where each package of the index is: name -> (version, path)."""
    url = f"{mirror}/dists/bookworm/main/binary-amd64/Packages.xz"
    index = lzma.decompress(urllib.request.urlopen(url, timeout=120).read()).decode()
    found = {}
    for entry in index.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Filename): (.*)$", entry, re.M))
        if "Package" in fields:
            found[fields["Package"]] = (fields["Version"], fields["Filename"])
    return found


def documents(path):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", path, folder], check=True)
        root = pathlib.Path(folder)
        for file in sorted(root.rglob("*")):
            if not file.is_file() or file.is_symlink() or file.stat().st_size > 20_000_000:
                continue
            name = re.sub(r"\.(gz|dz)$", "", str(file.relative_to(root)))
            if not re.search(r"\.(x?html?|txt|rst|pod|text)$|/(?:dict|fortunes)/", name) or re.search(r"genindex|changelog|copyright", name, re.I):
                continue
            raw = file.read_bytes()
            if file.suffix in (".gz", ".dz"):
                raw = gzip.decompress(raw)
            yield name, raw


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=pathlib.Path)
    arguments.add_argument("--mirror", default="https://deb.debian.org/debian")
    arguments.add_argument("--megabytes", type=int, default=110)
    arguments.add_argument("--exclude", type=pathlib.Path, help="jsonl: no paragraph that shares a run of words with it is kept")
    arguments = arguments.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    index = packages(arguments.mirror)
    seen, total, sources, excluded = set(), 0, [], set()
    if arguments.exclude:
        for line in arguments.exclude.open():
            excluded |= grams(json.loads(line)["text"])
    with open(arguments.folder / "train.jsonl", "w") as train, open(arguments.folder / "valid.jsonl", "w") as valid:
        for package in PACKAGES:
            if package not in index or total > arguments.megabytes * 1_000_000:
                continue
            version, path = index[package]
            with tempfile.NamedTemporaryFile(suffix=".deb") as archive:
                archive.write(urllib.request.urlopen(f"{arguments.mirror}/{path}", timeout=600).read())
                archive.flush()
                count = size = 0
                for name, raw in documents(archive.name):
                    kept = []
                    for text in paragraphs(name, raw):
                        key = hashlib.blake2b(text.encode(), digest_size=8).digest()
                        if is_prose(text) and key not in seen and not (excluded and excluded & grams(text)):
                            seen.add(key)
                            kept.append(text)
                    text = "\n\n".join(kept)
                    if len(text) < 400:
                        continue
                    identity = f"{package}/{name}"
                    held_out = hashlib.sha256(identity.encode()).digest()[0] < 3
                    (valid if held_out else train).write(json.dumps({"id": identity, "text": text}) + "\n")
                    count, size = count + 1, size + len(text)
            total += size
            sources.append((package, version, count, size))
            print(f"{package} {version}: {count} documents, {size / 1e6:.1f} MB; {total / 1e6:.0f} MB in all", flush=True)
    with open(arguments.folder / "sources.tsv", "w") as file:
        file.writelines("\t".join(map(str, source)) + "\n" for source in sources)


main()
