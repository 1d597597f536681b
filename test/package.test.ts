import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { dirname, join, posix } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';

// What `npm pack` takes along: everything that its modules load.

const root = join(dirname(fileURLToPath(import.meta.url)), '../..');

t.test('the package has what it loads', (t) => {
  const { stdout, stderr } = spawnSync('npm', ['pack', '--dry-run', '--json', '--ignore-scripts'], {
    cwd: root,
    encoding: 'utf8',
    shell: process.platform === 'win32',
  });
  const [report] = JSON.parse(stdout || '[]') as { files: { path: string }[] }[];
  const files = new Set((report?.files ?? []).map(({ path }) => path));
  t.ok(files.has('dist/lib/index.js'), stderr);
  const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
    exports: Record<string, string | Record<string, string>>;
    bin: Record<string, string>;
  };
  const named = [...Object.values(manifest.exports), ...Object.values(manifest.bin)]
    .flatMap((value) => (typeof value === 'string' ? [value] : Object.values(value)))
    .map((path) => posix.normalize(path));
  for (const path of named) t.ok(files.has(path), path);
  let loaded = 0;
  for (const path of files) {
    if (!path.endsWith('.js')) continue;
    const text = readFileSync(join(root, path), 'utf8');
    // A thread's file is relative to the module that it was in, which the bundle names beside it.
    for (const [, there = '', from] of text.matchAll(
      /(?:^(?:import|export)\b[^;]*?from\s*|^import\s*|new URL\()['"](\.[^'"]+)['"](?:, new URL\(['"]([^'"]+)['"])?/gm,
    )) {
      const target = posix.join(posix.dirname(path), from ? posix.dirname(from) : '.', there);
      // Names of modules that are in the bundle only serve to find others.
      if (/^\.\/(kernel\/linux\/addon|vcpu_worker|pager\/pager|migration\/receive_memory)\.js$/.test(there)) continue;
      loaded++;
      t.ok(files.has(target), `${path} loads ${target}`);
    }
  }
  t.ok(loaded > 10, `${loaded} files are loaded by others`);
  t.end();
});
