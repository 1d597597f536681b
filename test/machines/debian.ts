import { existsSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { cacheFolder } from './cache.ts';
import { logged, output, Problem } from './command.ts';

/** Debian's archive by an apt of our own: nothing of the system's is read or changed. */

const mirror = 'http://deb.debian.org/debian';
const suites = ['trixie', 'trixie-backports'];
const keyring = '/usr/share/keyrings/debian-archive-keyring.gpg';
const DAY = 86_400_000;

let ready: Promise<readonly string[]> | undefined;

/** The options of that apt, its lists not older than a day. */
function apt(): Promise<readonly string[]> {
  ready ??= prepare();
  return ready;
}

async function prepare(): Promise<readonly string[]> {
  if (!existsSync(keyring)) throw new Problem(`no ${keyring}: apt install debian-archive-keyring`);
  const folder = cacheFolder('apt');
  const [lists, archives] = [cacheFolder('apt/lists'), cacheFolder('apt/archives')];
  for (const each of [lists, archives]) cacheFolder(each.slice(cacheFolder().length + 1), 'partial');
  const [sources, status] = [join(folder, 'sources.list'), join(folder, 'status')];
  writeFileSync(sources, suites.map((suite) => `deb [signed-by=${keyring}] ${mirror} ${suite} main\n`).join(''));
  writeFileSync(status, '');
  const options = [
    ...['Dir::Etc::sourceparts=-', `Dir::Etc::sourcelist=${sources}`, `Dir::State::lists=${lists}`],
    ...[`Dir::Cache=${folder}`, `Dir::State::status=${status}`, 'APT::Architecture=amd64'],
    ...['APT::Architectures::=amd64', 'APT::Architectures::=arm64', 'APT::Sandbox::User='],
  ].flatMap((option) => ['-o', option]);
  const updated = join(folder, 'updated');
  if (!existsSync(updated) || Date.now() - statSync(updated).mtimeMs > DAY) {
    console.log(`fetching the package lists of ${suites.join(' and ')}`);
    await logged(join(folder, 'update.log'), 'apt-get', [...options, 'update']);
    writeFileSync(updated, '');
  }
  return options;
}

/** The newest package whose name matches, and its version. */
export async function newest(pattern: RegExp): Promise<{ name: string; version: string }> {
  const options = await apt();
  const names = output('apt-cache', [...options, 'pkgnames', 'linux-source-'])
    .split('\n')
    .filter((name) => pattern.test(name))
    .sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));
  const name = names.at(-1);
  if (!name) throw new Problem(`no package ${pattern.source} in ${suites.join(' or ')}`);
  const version = /Candidate: (.*)/.exec(output('apt-cache', [...options, 'policy', name]))?.[1] ?? '';
  return { name, version };
}

/** Unpacks packages, 'name' or 'name:arch', into a folder. */
export async function unpack(packages: readonly string[], folder: string): Promise<void> {
  const options = await apt();
  const archives = cacheFolder('apt/archives');
  const uris = output('apt-get', [...options, 'download', '--print-uris', ...packages]);
  await logged(join(archives, '../download.log'), 'apt-get', [...options, '-q', 'download', ...packages], {
    cwd: archives,
  });
  for (const [, file = ''] of uris.matchAll(/^'.*' (\S+) /gm)) output('dpkg-deb', ['-x', join(archives, file), folder]);
}
