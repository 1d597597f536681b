// What the scripts that compile the addon share: where the headers are, which tools there are, and copies to build in.

import {
  accessSync,
  constants,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  rmSync,
  statSync,
  symlinkSync,
} from 'node:fs';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { machineOf, machines } from './elf.mjs';

export const root = fileURLToPath(new URL('..', import.meta.url));

/** node-gyp's environment: with the headers installed beside this Node, if they are, so that nothing is downloaded. */
export function gypEnvironment() {
  const prefix = join(dirname(process.execPath), '..');
  const local = existsSync(join(prefix, 'include/node/node_api.h'));
  return local ? { npm_config_nodedir: prefix, ...process.env } : process.env;
}

/** Whether a program is on PATH, or where it says; only its first word counts, since CXX may carry flags. */
export function installed(program) {
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

/** What a build of the addon needs and this machine lacks. */
export function missingTools() {
  const tools = [
    { name: 'a C++ compiler', programs: [process.env.CXX, 'c++', 'g++', 'clang++'] },
    { name: 'make', programs: [process.env.MAKE, 'make'] },
    { name: 'python3', programs: [process.env.PYTHON, process.env.npm_config_python, 'python3', 'python'] },
  ];
  return tools.filter(({ programs }) => !programs.some(installed)).map(({ name }) => name);
}

/** Whether an addon is newer than everything it is made of, and for this architecture. */
export function isUpToDate(addon, arch) {
  if (!existsSync(addon) || machineOf(addon) !== machines[arch]) return false;
  const built = statSync(addon).mtimeMs;
  const sources = readdirSync(join(root, 'native'), { recursive: true }).map((name) => join('native', name));
  return ['binding.gyp', ...sources].every((name) => statSync(join(root, name)).mtimeMs < built);
}

/** A fresh directory with what the addon is built from, so that build/ of the clone stays as it is. */
export function copySources(directory) {
  rmSync(directory, { recursive: true, force: true });
  mkdirSync(directory, { recursive: true });
  for (const name of ['native', 'binding.gyp', 'package.json']) {
    cpSync(join(root, name), join(directory, name), { recursive: true });
  }
  symlinkSync(join(root, 'node_modules'), join(directory, 'node_modules'));
}
