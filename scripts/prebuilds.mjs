// Builds the addon for every platform of the package into prebuilds/, and checks the set: nothing is missing, each file is for
// the machine its name says (a cross build without its compiler quietly makes one for this machine), and none asks for newer
// system libraries than the oldest that Node itself runs on.
//   --arch=arm64  only that one
//   --outdated    only what is older than its sources
//   --available   leaves out, with a warning, what this machine has no compiler for: for `npm pack`, not for a release

import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { machineOf, machines, versionsNeeded } from './elf.mjs';
import { copySources, gypEnvironment, installed, isUpToDate, missingTools, root } from './toolchain.mjs';

/** The newest symbol versions of the systems the official Node 20 to 26 run on. */
const floor = { GLIBC: '2.28', GLIBCXX: '3.4.21', CXXABI: '1.3.9', GCC: '4.3.0' };

const compilers = {
  x64: { triplet: 'x86_64-linux-gnu', install: 'g++-x86-64-linux-gnu' },
  arm64: { triplet: 'aarch64-linux-gnu', install: 'g++-aarch64-linux-gnu' },
};

if (process.platform !== 'linux') {
  console.error(`prebuilds: made on Linux, and this is ${process.platform}`);
  process.exit(1);
}
const onlyAvailable = process.argv.includes('--available');
const onlyOutdated = process.argv.includes('--outdated');
const wanted = Object.keys(compilers).filter(
  (arch) => process.argv.includes(`--arch=${arch}`) || !process.argv.some((argument) => argument.startsWith('--arch=')),
);
const built = wanted
  .filter((arch) => !(onlyOutdated && prebuilt(arch).some((file) => isUpToDate(file, arch))))
  .filter(build);
process.exit(built.length === 0 || report(built.map(inspect)) ? 0 : 1);

function prebuilt(arch) {
  const directory = join(root, 'prebuilds', `linux-${arch}`);
  const names = existsSync(directory) ? readdirSync(directory) : [];
  return names.filter((name) => name.endsWith('.node')).map((name) => join(directory, name));
}

/** False when this machine cannot, and need not. */
function build(arch) {
  const cross = arch !== process.arch;
  const { triplet, install } = compilers[arch];
  const tools = cross ? { CC: `${triplet}-gcc`, CXX: `${triplet}-g++`, PREBUILD_STRIP_BIN: `${triplet}-strip` } : {};
  const missing = [...Object.values(tools).filter((tool) => !installed(tool)), ...(cross ? [] : missingTools())];
  if (missing.length > 0) {
    console.error(
      `prebuilds: linux-${arch} needs ${missing[0]}: sudo apt install ${cross ? install : 'g++ make python3'}`,
    );
    if (onlyAvailable) return false;
    process.exit(1);
  }

  const directory = mkdtempSync(join(tmpdir(), 'guest-memfd-prebuild-'));
  copySources(directory);
  rmSync(join(root, 'prebuilds', `linux-${arch}`), { recursive: true, force: true });
  const prebuildify = createRequire(import.meta.url).resolve('prebuildify/bin.js');
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    [prebuildify, '--napi', '--strip', `--arch=${arch}`, `--out=${root}`],
    { cwd: directory, env: { ...gypEnvironment(), ...tools }, encoding: 'utf8', maxBuffer: 1 << 28 },
  );
  rmSync(directory, { recursive: true, force: true });
  if (status !== 0) {
    process.stderr.write(`${stdout}${stderr}`);
    console.error(`prebuilds: linux-${arch} failed, see above`);
    process.exit(1);
  }
  return true;
}

/** One line of the table: what the file is, and everything that is wrong with it. */
function inspect(arch) {
  const files = prebuilt(arch);
  if (files.length !== 1) return { platform: `linux-${arch}`, problems: [`${files.length} addons instead of one`] };

  const [file] = files;
  const machine = machineOf(file);
  const problems = machine === machines[arch] ? [] : [`built for ELF machine ${machine}, not ${machines[arch]}`];
  const line = { platform: `linux-${arch}`, file: basename(file), bytes: statSync(file).size, problems };
  for (const version of machine === undefined ? [] : versionsNeeded(file)) {
    const [, family, number] = /^([A-Z]+)_([\d.]+)$/.exec(version) ?? [];
    if (floor[family] === undefined) {
      problems.push(`needs ${version}, which is not known to be everywhere`);
      continue;
    }
    if (compare(number, line[family] ?? '0') > 0) line[family] = number;
    if (compare(number, floor[family]) > 0) problems.push(`needs ${version}, newer than ${floor[family]}`);
  }
  return line;
}

function compare(a, b) {
  const [x, y] = [a, b].map((version) => version.split('.').map(Number));
  const at = x.findIndex((part, index) => part !== (y[index] ?? 0));
  return at < 0 ? x.length - y.length : x[at] - (y[at] ?? 0);
}

function report(lines) {
  console.table(
    Object.fromEntries(
      lines.map(({ platform, file = 'missing', bytes = 0, GLIBC = '', GLIBCXX = '', CXXABI = '' }) => [
        platform,
        { file, bytes, GLIBC, GLIBCXX, CXXABI },
      ]),
    ),
  );
  const problems = lines.flatMap(({ platform, problems }) => problems.map((problem) => `${platform}: ${problem}`));
  for (const problem of problems) console.error(`prebuilds: ${problem}`);
  return problems.length === 0;
}
