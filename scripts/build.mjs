// Builds the native addon, then the TypeScript. `npm run prepare` in a clone, and `npm run build`.
//   --addon, --typescript   only that part

import { spawnSync } from 'node:child_process';
import { chmodSync, existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { bundle } from './bundle.mjs';
import { machines } from './elf.mjs';
import { gypEnvironment, isUpToDate, missingTools, root } from './toolchain.mjs';

const require = createRequire(import.meta.url);
const addon = join(root, 'build/Release/guest_memfd.node');

const only = process.argv.slice(2);
const unknown = only.filter((argument) => argument !== '--addon' && argument !== '--typescript');
if (unknown.length > 0) {
  console.error(`build: unknown ${unknown.join(' ')}; there are --addon and --typescript`);
  process.exit(2);
}
const wanted = (part) => only.length === 0 || only.includes(part);

if (wanted('--addon') && !buildAddon()) process.exit(1);
if (wanted('--typescript') && !(await buildTypeScript())) process.exit(1);

/** False only when a build was tried and failed: without Linux or a compiler the software kernel still works. */
function buildAddon() {
  if (process.platform !== 'linux' || !(process.arch in machines)) {
    console.log(`addon: not built, it is for Linux on x64 and arm64 and this is ${process.platform}-${process.arch}.`);
    console.log('addon: the software kernel works here.');
    return true;
  }
  if (isUpToDate(addon, process.arch)) {
    console.log('addon: up to date');
    return true;
  }
  const missing = missingTools();
  if (missing.length > 0) {
    console.log(
      `addon: not built, ${missing.join(' and ')} not found; only the software kernel is available until then.`,
    );
    console.log('addon: to have the real one: sudo apt install g++ make python3 && npm run build');
    return true;
  }
  const gyp = require.resolve('node-gyp/bin/node-gyp.js');
  const build = spawnSync(process.execPath, [gyp, 'rebuild'], {
    cwd: root,
    env: gypEnvironment(),
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  });
  if (build.status === 0) {
    console.log('addon: built');
    return true;
  }
  process.stderr.write(`${build.stdout ?? ''}${build.stderr ?? ''}`);
  console.error('addon: the build failed, see above');
  return false;
}

async function buildTypeScript() {
  const tsc = require.resolve('typescript/bin/tsc');
  if (spawnSync(process.execPath, [tsc], { cwd: root, stdio: 'inherit' }).status !== 0) return false;
  await bundle();
  // npm marks a bin executable when it installs a package, but not in a clone.
  const cli = join(root, 'dist/lib/cli/main.js');
  if (existsSync(cli)) chmodSync(cli, 0o755);
  return true;
}
