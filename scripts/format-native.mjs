// Formats native/ with clang-format. With --check it only lists the files that are not formatted, and fails.

import { spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const cli = createRequire(import.meta.url)
  .resolve('clang-format-node')
  .replace(/index\.js$/, 'cli.js');
const check = process.argv.includes('--check');

const files = readdirSync(join(root, 'native'), { recursive: true })
  .filter((name) => /\.(cc|h)$/.test(name))
  .map((name) => join('native', name))
  .sort();

const mode = check ? ['--dry-run', '-Werror'] : ['-i'];
const format = (file) =>
  spawnSync(process.execPath, [cli, '--style=file', ...mode, file], { cwd: root, encoding: 'utf8' });

const failed = [];
for (const file of files) {
  const { status, stderr } = format(file);
  if (status !== 0) failed.push({ file, stderr });
}
if (failed.length > 0 && check) {
  console.error(`${failed.length} of ${files.length} native files are not formatted; run npm run format:`);
  for (const { file, stderr } of failed) console.error(`  ${file}:${/:(\d+):\d+: error/.exec(stderr)?.[1] ?? 1}`);
} else {
  for (const { file, stderr } of failed) console.error(`${file}: clang-format failed\n${stderr}`);
}
process.exit(failed.length > 0 ? 1 : 0);
