// Builds the native addon, then the TypeScript. `npm run prepare` in a clone, and `npm run build`.
//   --addon, --typescript   only that part

import { spawnSync } from 'node:child_process';
import { accessSync, chmodSync, constants, existsSync, readdirSync, statSync } from 'node:fs';
import { createRequire } from 'node:module';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { machineOf, machines } from './elf.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
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
if (wanted('--typescript') && !buildTypeScript()) process.exit(1);

/** False only when a build was tried and failed: without Linux or a compiler the software kernel still works. */
function buildAddon() {
  if (process.platform !== 'linux' || !(process.arch in machines)) {
    console.log(`addon: not built, it is for Linux on x64 and arm64 and this is ${process.platform}-${process.arch}.`);
    console.log('addon: the software kernel works here.');
    return true;
  }
  if (upToDate()) {
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
  const build = spawnSync(process.execPath, [gyp, 'rebuild', ...localHeaders()], {
    cwd: root,
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

/** The headers installed with this Node, if they are: nothing needs to be downloaded then. npm's own `nodedir` goes first. */
function localHeaders() {
  const prefix = join(dirname(process.execPath), '..');
  const local = existsSync(join(prefix, 'include/node/node_api.h'));
  return local && process.env.npm_config_nodedir === undefined ? [`--nodedir=${prefix}`] : [];
}

function buildTypeScript() {
  const tsc = require.resolve('typescript/bin/tsc');
  if (spawnSync(process.execPath, [tsc], { cwd: root, stdio: 'inherit' }).status !== 0) return false;
  // npm marks a bin executable when it installs a package, but not in a clone.
  const cli = join(root, 'dist/lib/cli/main.js');
  if (existsSync(cli)) chmodSync(cli, 0o755);
  return true;
}

/** Newer than everything it is made of, and for the machine this Node runs on. */
function upToDate() {
  if (!existsSync(addon) || machineOf(addon) !== machines[process.arch]) return false;
  const built = statSync(addon).mtimeMs;
  const sources = readdirSync(join(root, 'native'), { recursive: true }).map((name) => join('native', name));
  return ['binding.gyp', ...sources].every((name) => statSync(join(root, name)).mtimeMs < built);
}

/** What a build needs, each under the names it goes by. */
function missingTools() {
  const tools = [
    { name: 'a C++ compiler', programs: [process.env.CXX, 'c++', 'g++', 'clang++'] },
    { name: 'make', programs: [process.env.MAKE, 'make'] },
    { name: 'python3', programs: [process.env.PYTHON, process.env.npm_config_python, 'python3', 'python'] },
  ];
  return tools.filter(({ programs }) => !programs.some(installed)).map(({ name }) => name);
}

/** The first word of `program`, since CXX may carry flags or a wrapper, by path or on PATH. */
function installed(program) {
  const [name] = program?.trim().split(/\s+/) ?? [];
  if (!name) return false;
  const places = name.includes('/') ? [''] : (process.env.PATH ?? '').split(delimiter);
  return places.some((place) => {
    try {
      accessSync(join(place, name), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}
