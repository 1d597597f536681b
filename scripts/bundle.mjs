import { readdirSync, readFileSync } from 'node:fs';
import { join, relative, sep } from 'node:path';
import { rollup } from 'rollup';
import { root } from './toolchain.mjs';

// Puts the modules that tsc made of lib/ into one file, dist/lib/modules.js, and leaves at the place of each what takes its exports from there:
// importing the package reads two files instead of 130, which takes a third of the time, in each process and each worker of a VMM.

const folder = join(root, 'dist/lib');
/** What does something when it is imported, that is, what threads of the library begin with; and the command line, which no library needs. */
const apart = /^(cli\/|vcpu_worker_thread|pager\/pager_thread|migration\/page_client)/;

/** Modules that need each other; tsc's helpers for `using`; modules of nothing but types. */
const expected = ['CIRCULAR_DEPENDENCY', 'THIS_IS_UNDEFINED', 'EMPTY_BUNDLE'];

const placeOf = (id) => relative(folder, id).split(sep).join('/');

/** Right after tsc. */
export async function bundle() {
  const files = readdirSync(join(root, 'lib'), { recursive: true, encoding: 'utf8' });
  const modules = files.filter((name) => name.endsWith('.ts')).map((name) => name.replace(/\.ts$/, ''));
  // First what a program of a user's begins with: where modules need each other, its order decides.
  const names = new Set(['index', ...modules]);
  const build = await rollup({
    input: Object.fromEntries([...names].map((name) => [name, join(folder, `${name}.js`)])),
    external: /^node:/,
    treeshake: false,
    preserveEntrySignatures: 'strict',
    plugins: [
      {
        name: 'as tsc made it',
        load: (id) => ({ code: readFileSync(id, 'utf8'), map: readFileSync(`${id}.map`, 'utf8') }),
        resolveImportMeta: (property, { moduleId, chunkId }) =>
          property === 'url' && chunkId === 'modules.js'
            ? `new URL('./${placeOf(moduleId)}', import.meta.url).href`
            : null,
      },
    ],
    onwarn: (warning) => {
      if (!expected.includes(warning.code)) throw new Error(warning.message);
    },
  });
  await build.write({
    dir: folder,
    format: 'es',
    sourcemap: true,
    minifyInternalExports: false,
    hoistTransitiveImports: false,
    entryFileNames: '[name].js',
    chunkFileNames: '[name].js',
    manualChunks: (id) => (apart.test(placeOf(id)) ? null : 'modules'),
  });
  await build.close();
}
