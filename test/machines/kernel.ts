import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import type { Arch } from '../../lib/model_options.ts';
import { cache, cacheFolder } from './cache.ts';
import { logged, output } from './command.ts';
import { newest, unpack } from './debian.ts';
import { configHash, kernelConfig, missingOptions } from './kernel_config.ts';
import type { Machine } from './machines.ts';
import { duration, progress } from './progress.ts';

const builds: Record<Arch, { make: string; cross: string; target: string; image: string }> = {
  x86_64: { make: 'x86_64', cross: 'x86_64-linux-gnu-', target: 'bzImage', image: 'arch/x86/boot/bzImage' },
  aarch64: { make: 'arm64', cross: 'aarch64-linux-gnu-', target: 'Image', image: 'arch/arm64/boot/Image' },
};
/** For the progress shown: object files of a build. */
const OBJECTS: Record<Arch, number> = { x86_64: 1900, aarch64: 1750 };

/** The newest cached kernel that suits a machine. */
export function cachedKernel({ arch, series }: Machine): string | undefined {
  const end = `-${arch}-${configHash(arch)}`;
  const isWanted = (name: string) =>
    name.endsWith(end) && (series === 'newest' ? !/^6\./.test(name) : name.startsWith(`${series}.`));
  const found = existsSync(cache) ? readdirSync(cache).filter(isWanted) : [];
  const name = found.sort((a, b) => a.localeCompare(b, 'en', { numeric: true })).at(-1);
  const image = name && join(cache, name, 'image');
  return image && existsSync(image) ? image : undefined;
}

/** The cached kernel, or one that is built now. */
export async function kernelFor(machine: Machine): Promise<string> {
  return cachedKernel(machine) ?? (await build(machine));
}

async function build({ arch, series }: Machine): Promise<string> {
  const start = Date.now();
  const source = await newest(series === 'newest' ? /^linux-source-[\d.]+$/ : new RegExp(`^linux-source-${series}$`));
  const tree = await sourceTree(source);
  const { make, cross, target, image } = builds[arch];
  const work = cacheFolder('build', `${source.name}-${arch}`);
  const args = ['-C', tree, `O=${work}`, `ARCH=${make}`, `CROSS_COMPILE=${cross}`];
  const release = output('make', ['-s', '-C', tree, 'kernelversion']).trim();
  const [config, log] = [join(work, '.config'), join(work, 'build.log')];
  await logged(log, 'make', [...args, 'tinyconfig']);
  writeFileSync(config, `${readFileSync(config, 'utf8')}${kernelConfig(arch)}`);
  await logged(log, 'make', [...args, 'olddefconfig']);
  const missing = missingOptions(arch, readFileSync(config, 'utf8'));
  if (missing.length > 0) console.log(`Linux ${release} has no ${missing.join(', ')}`);

  const show = progress(`building Linux ${release} for ${arch}`, OBJECTS[arch]);
  await logged(log, 'nice', ['make', `-j${availableParallelism()}`, ...args, target], {
    onLine: (line) => /^ {2}(CC|AS|AR|LD) /.test(line) && show(),
  });
  console.log(`built Linux ${release} for ${arch} in ${duration(Date.now() - start)}`);

  const name = `${release}-${arch}-${configHash(arch)}`;
  const [unfinished, finished] = [join(cache, `.${name}`), join(cache, name)];
  mkdirSync(unfinished, { recursive: true });
  cpSync(join(work, image), join(unfinished, 'image'));
  cpSync(config, join(unfinished, 'config'));
  rmSync(finished, { recursive: true, force: true });
  renameSync(unfinished, finished);
  rmSync(work, { recursive: true, force: true });
  return join(finished, 'image');
}

/** Debian's source, unpacked once for all architectures. */
async function sourceTree({ name, version }: { name: string; version: string }): Promise<string> {
  const folder = join(cache, 'source', `${name}-${version}`);
  if (existsSync(folder)) return folder;
  console.log(`fetching ${name} ${version}`);
  const work = cacheFolder('source/unpacking');
  await unpack([name], work);
  console.log('unpacking it');
  output('tar', ['-C', work, '-xf', join(work, 'usr/src', `${name}.tar.xz`)]);
  renameSync(join(work, name), folder);
  rmSync(work, { recursive: true, force: true });
  return folder;
}
