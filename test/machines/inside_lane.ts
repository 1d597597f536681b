import { resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';
import t from 'tap';

// A process of inside.ts: runs each test file that a line names, and says when its tests are over.

let teardowns: (() => unknown)[] = [];
// tap would take the end of a file for the end of everything.
t.teardown = (teardown) => {
  teardowns.unshift(teardown);
};
for await (const file of createInterface(process.stdin)) {
  try {
    await import(pathToFileURL(resolve(file)).href);
  } catch (error) {
    t.fail(`${file} cannot be run: ${(error as Error).message}`);
  }
  // Tests run in order: this one is behind those of the file.
  await t.test('end of file', async () => {
    for (const teardown of teardowns) await teardown();
  });
  teardowns = [];
}
